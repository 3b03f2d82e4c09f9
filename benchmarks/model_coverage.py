"""Which model families of transformers hotset runs: each in small, against `generate`.

    python benchmarks/model_coverage.py --out benchmarks/results/model_coverage.json
    python benchmarks/model_coverage.py --table docs/models.md

The first command runs every family of the installed transformers' tables of causal, of
image-text-to-text and of multimodal models, or those named behind it; with `--out` it adds to what
that file has. A tiny random model (see `tiny_families.py`) is saved, loaded as a user's folder is,
and answers four prompts greedily in float32 on the CPU in five ways. The second command writes the
table of the page anew.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_families
import torch
import transformers

from hotset.cost.cache_spec import state_slot_bytes
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.errors import HotsetError, ModelError
from hotset.executor.probe import inspect_model
from hotset.expert_options import HostedExperts
from hotset.experts.sizes import slot_bytes_of
from hotset.experts.weights import experts_layers
from hotset.model.architecture import find_architecture
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.units import GIB

EQUAL, REFUSED, WRONG, CRASH, UNMEASURED = "equal", "refused", "wrong", "crash", "not measured"
PROMPT_LENGTHS = (5, 27, 23, 33)
MAX_TOKENS = 12
_STATE_SLOTS = 6  # of four requests, and two that are reserved
BLOCK_SIZE = 4
TIME_LIMIT_S = 240
START, END = "<!-- table: benchmarks/model_coverage.py -->", "<!-- end of table -->"


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Four prompts of ids without a meaning of their own, two with a common start."""
    rng = random.Random(0)
    most = min(vocab_size, tiny_families.FIRST_SPECIAL_ID) - 1
    common = [rng.randint(3, most) for _ in range(16)]
    prompts = [[rng.randint(3, most) for _ in range(length)] for length in PROMPT_LENGTHS]
    prompts[1][: len(common)] = common
    prompts[3][: len(common)] = common
    return prompts


def measure(model_type: str) -> dict[str, Any]:
    """The verdict on a family, the message behind it, and what the run was like."""
    try:
        model = tiny_families.tiny_model(model_type)
    except Exception as error:
        return _by_default_config(model_type, f"no tiny model: {_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return _by_default_config(model_type, f"cannot be saved: {_line(error)}")
        try:
            loaded = load_model(folder, device="cpu", dtype="float32")
            inspect_model(loaded.model)
        except HotsetError as error:
            return {"verdict": REFUSED, "message": _message(error, folder)}
        except Exception as error:
            return {"verdict": CRASH, "message": _line(error)}
        prompts = make_prompts(loaded.model.config.get_text_config().vocab_size)
        try:
            expected = reference(model, prompts)
        except Exception as error:
            return {"verdict": UNMEASURED, "message": f"no reference: {_line(error)}"}
        del loaded
        facts: dict[str, Any] = {"distinct_tokens": len({t for e in expected for t in e})}
        try:
            runs = run_five_ways(folder, prompts)
        except HotsetError as error:
            return {"verdict": REFUSED, "message": _message(error, folder)}
        except Exception as error:
            return {"verdict": CRASH, "message": _line(error)}
    wrong = [name for name, (answers, _) in runs.items() if answers != expected]
    facts |= runs["preempted"][1]
    if wrong:
        return {"verdict": WRONG, "message": f"differs: {', '.join(wrong)}", **facts}
    return {"verdict": EQUAL, "message": "", **facts}


def reference(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What `generate` answers, greedily and by eager attention, prompt by prompt."""
    with contextlib.suppress(Exception):
        model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def run_five_ways(
    folder: str, prompts: list[list[int]]
) -> dict[str, tuple[list[list[int]], dict[str, int]]]:
    """Answers of a folder's model by the way of running, and what was counted on that way."""
    runs = {}
    roomy = make_engine(folder, num_blocks=200, max_num_batched_tokens=24)
    runs["batched"] = run(roomy, prompts)
    runs["prefix cache"] = run(roomy, prompts)
    hits = roomy.metrics.cached_tokens.total()
    roomy.close()
    tight = make_engine(folder, num_blocks=24, max_num_batched_tokens=7)
    runs["24 blocks"] = run(tight, prompts)
    tight.close()
    preempted = make_engine(folder, num_blocks=200, max_num_batched_tokens=48)

    def preempt_one() -> None:
        if len(preempted.scheduler.running) > 1:
            preempted.scheduler._preempt_last()

    answers, facts = run(preempted, prompts, preempt_one)
    runs["preempted"] = answers, facts | {"cached_tokens": hits}
    preempted.close()
    alone = make_engine(folder, num_blocks=200, max_num_seqs=1, prefix_caching=False)
    runs["alone"] = run(alone, prompts)
    alone.close()
    return runs


def make_engine(folder: str, *, num_blocks: int, **options: Any) -> Engine:
    """An engine over a fresh load of the folder, with about `num_blocks` blocks of KV."""
    loaded: LoadedModel = load_model(folder, device="cpu", dtype="float32")
    layout = inspect_model(loaded.model)
    kv_bytes = (num_blocks + 0.5) * BLOCK_SIZE * layout.bytes_per_token
    states_bytes = _STATE_SLOTS * state_slot_bytes(layout.states.values())
    if slot_bytes_of(loaded.model, HostedExperts()) is not None:
        options["expert_slots"] = experts_layers(loaded.model)[0].num_experts
    config = Options.of(
        hot_gib=(kv_bytes + states_bytes) / GIB,
        host_gib=0.0,
        disk_gib=0.0,
        block_size=BLOCK_SIZE,
        max_model_len=64,
        **options,
    )
    return build_engine(config, loaded)


def run(
    engine: Engine, prompts: list[list[int]], each_step: Callable[[], None] = lambda: None
) -> tuple[list[list[int]], dict[str, int]]:
    """All prompts at once, or one by one where the engine takes one; answers and counts."""
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs: dict[str, list[int]] = {engine.add_request(p, params): [] for p in prompts}
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(output.error)
            outputs[output.request_id] += output.token_ids
        each_step()
    return list(outputs.values()), {"preemptions": engine.metrics.preemptions}


def _by_default_config(model_type: str, why: str) -> dict[str, Any]:
    """The verdict by the config alone, where no tiny model could be made."""
    try:
        config = transformers.CONFIG_MAPPING[model_type]()
        find_architecture(config, "FOLDER", {})
    except ModelError as error:
        if "cannot make a model" not in str(error):  # else transformers itself cannot
            return {"verdict": REFUSED, "message": str(error), "by": "default config"}
    except Exception as error:
        return {"verdict": UNMEASURED, "message": f"{why}; default config: {_line(error)}"}
    return {"verdict": UNMEASURED, "message": why}


def _message(error: HotsetError, folder: str) -> str:
    return str(error).replace(folder, "FOLDER").replace(Path(folder).name, "FOLDER")


def _line(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:240]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def measure_apart(model_type: str, measured: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """`measured` in a process of its own, with a time limit; libraries were imported before."""
    started = time.monotonic()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(TIME_LIMIT_S)
        os.close(read)
        result = {"verdict": CRASH, "message": "ended without a word"}
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                result = measured(model_type)
        except BaseException as error:
            result = {"verdict": CRASH, "message": _line(error)}
        finally:
            with os.fdopen(write, "w") as pipe:
                json.dump(result, pipe)
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    seconds = round(time.monotonic() - started, 1)
    if not text:
        message = f"ended by signal {status & 127} (time limit {TIME_LIMIT_S} s)"
        return {"verdict": UNMEASURED, "message": message, "seconds": seconds}
    return {**json.loads(text), "seconds": seconds}


def measure_all(names: list[str], out: Path | None) -> None:
    """Measure families one after another; after each, what is known is in `out`."""
    kinds = tiny_families.families()
    results = json.loads(out.read_text()) if out is not None and out.exists() else {}
    families: dict[str, Any] = results.get("families", {})
    for name in names:
        families[name] = {"kind": kinds[name], **measure_apart(name, measure)}
        print(f"{name}: {families[name]['verdict']} {families[name]['message']}", flush=True)
        if out is not None:
            ordered = {known: families[known] for known in kinds if known in families}
            about = {
                "command": "benchmarks/model_coverage.py",
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "prompt_lengths": PROMPT_LENGTHS,
                "max_tokens": MAX_TOKENS,
                "counts": Counter(family["verdict"] for family in ordered.values()),
            }
            out.write_text(json.dumps(about | {"families": ordered}, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Counts and one row per family, in Markdown."""
    families: dict[str, dict[str, Any]] = results["families"]
    verdicts = (EQUAL, REFUSED, WRONG, CRASH, UNMEASURED)
    lines = [
        f"transformers {results['transformers']}, torch {results['torch']}, float32 on a CPU.",
        "",
        f"| | families | {' | '.join(verdicts)} |",
        f"|---|---|{'---|' * len(verdicts)}",
    ]
    for kind, title in (("causal", "causal language models"), ("wrapper", "multimodal wrappers")):
        counts = Counter(f["verdict"] for f in families.values() if f["kind"] == kind)
        cells = " | ".join(str(counts[verdict]) for verdict in verdicts)
        lines.append(f"| {title} | {counts.total()} | {cells} |")
    lines += ["", "| family | verdict | why |", "|---|---|---|"]
    for name in sorted(families):
        family = families[name]
        why = family["message"].replace("FOLDER is", "it is").replace("|", "\\|")
        lines.append(f"| `{name}` | {family['verdict']} | {why[:200]} |")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; all of them where none is given")
    parser.add_argument("--out", type=Path, help="JSON to write, or to add to")
    parser.add_argument("--part", help="I/N: only each N-th family, from the I-th on")
    parser.add_argument("--table", type=Path, help="page whose table is written from the results")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/model_coverage.json")
    )
    options = parser.parse_args()
    if options.table is not None:
        page = options.table.read_text()
        before, rest = page.split(START)
        after = rest.split(END)[1]
        made = table(json.loads(options.results.read_text()))
        options.table.write_text(f"{before}{START}\n{made}\n{END}{after}")
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known = tiny_families.families()
    if unknown := [name for name in options.families if name not in known]:
        sys.exit(f"transformers {transformers.__version__} has no family {unknown[0]!r}")
    names = options.families or list(known)
    if options.part:
        index, count = map(int, options.part.split("/"))
        names = names[index - 1 :: count]
    measure_all(names, options.out)


if __name__ == "__main__":
    main()
