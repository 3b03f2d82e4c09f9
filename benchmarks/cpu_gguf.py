"""A GGUF file on a CPU: narrow, widened, and by llama.cpp, for one user and for 16 at once.

Three sides compute the same greedy tokens after the same prompts of random tokens:

- `narrow`: this engine, matrices as in the file.
- `widened`: this engine, the same file dequantised to float32 (only with `--widened`: it takes
  5 times the memory).
- `llama.cpp`: llama-cpp-python, all users in one batch in each step.

Each side is a process of its own, and they take turns. Times are the least of the repeats, of the
wall and of CPU seconds: other work on the machine lengthens the former, and less so the latter.
llama.cpp is in an environment of its own, whose Python is named:

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python==0.3.36
    python benchmarks/cpu_gguf.py --llama-python /tmp/llama/bin/python --threads 2

With `--out PATH` it writes `PATH.json` and `PATH.md`.
"""

import argparse
import ctypes
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOT_GIB = 0.5
# A side: prompts and the number of tokens to each -> the tokens of each.
Serve = Callable[[list[list[int]], int], list[list[int]]]


def hotset_side(file: str, threads: int, users: int, *, narrow: bool) -> Serve:
    from dataclasses import replace

    from hotset.engine.build import build_engine  # before torch, for how its threads wait
    from hotset.engine.run import run_to_end
    from hotset.model.checkpoint import load_gguf
    from hotset.model.loader import load_model
    from hotset.options import Options
    from hotset.request import SamplingParams

    loaded = load_model(file, device="cpu", dtype="float32")
    if not narrow:
        import torch

        model, *_ = load_gguf(Path(file), torch.device("cpu"), torch.float32)
        loaded = replace(loaded, model=model.eval().requires_grad_(False))
    options = Options.of(hot_gib=HOT_GIB, max_num_seqs=users, prefix_caching=False, threads=threads)
    engine = build_engine(options, loaded)

    def serve(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        ids = [engine.add_request(prompt, params) for prompt in prompts]
        tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
        for output in run_to_end(engine):
            tokens[output.request_id] += output.token_ids
        return [tokens[request_id] for request_id in ids]

    return serve


def llama_side(file: str, threads: int, users: int) -> Serve:
    import llama_cpp
    import numpy as np

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        file.encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max, params.n_ctx, params.n_batch = users, 512 * users, 8192
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(8192, 0, 1)

    def step(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode `(token, position, user, wants logits)`; the largest logit of each that does."""
        batch.n_tokens = len(entries)
        for place, (token, position, user, wants) in enumerate(entries):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, user
            batch.logits[place] = wants
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        found = []
        for place, (*_, wants) in enumerate(entries):
            if wants:
                logits = llama_cpp.llama_get_logits_ith(context, place)
                found.append(int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax()))
        return found

    def serve(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        entries = [
            (token, position, user, position == len(prompt) - 1)
            for user, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        steps = [step(entries)]
        for count in range(num_tokens - 1):
            steps.append(
                step(
                    [
                        (token, len(prompts[user]) + count, user, True)
                        for user, token in enumerate(steps[-1])
                    ]
                )
            )
        return [list(tokens) for tokens in zip(*steps, strict=True)]

    return serve


def run_side(args: argparse.Namespace) -> None:
    """Serve what stdin asks for, a line of JSON each; answer with tokens and seconds."""
    if args.side == "llama.cpp":
        serve = llama_side(args.file, args.threads, args.users)
    else:
        serve = hotset_side(args.file, args.threads, args.users, narrow=args.side == "narrow")
    for line in sys.stdin:
        asked = json.loads(line)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        tokens = serve(asked["prompts"], asked["num_tokens"])
        times = {
            "wall_s": time.perf_counter() - wall_s,
            "cpu_s": time.process_time() - cpu_s,
        }
        print(json.dumps({"tokens": tokens, **times}), flush=True)


class Side:
    """A process that serves; it waits while others have their turn."""

    def __init__(self, python: str, name: str, args: argparse.Namespace) -> None:
        command = [python, __file__, "--side", name, "--file", args.file]
        command += ["--threads", str(args.threads), "--users", str(args.users)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """The tokens of each prompt, and seconds of the wall and of CPU."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self._process.args} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def measure(sides: dict[str, Side], args: argparse.Namespace, users: int) -> dict[str, Any]:
    """Prompt and decode rates of each side, per second of the wall and of CPU."""
    draw = random.Random(args.seed)
    prompts = [
        [draw.randrange(100, 40_000) for _ in range(args.prompt_tokens)] for _ in range(users)
    ]
    first: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    whole: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for repeat in range(args.repeats):
        for name, side in sides.items():
            first[name].append(side.ask(prompts, 1))
            whole[name].append(side.ask(prompts, 1 + args.output_tokens))
            seconds = whole[name][-1]["wall_s"]
            print(f"{users} users, repeat {repeat + 1}, {name}: {seconds:.2f} s", file=sys.stderr)
    reference = whole["widened" if "widened" in sides else "narrow"][0]["tokens"]
    found = {}
    for name in sides:
        rates = {}
        for clock in ("wall_s", "cpu_s"):
            prompt_s = min(answer[clock] for answer in first[name])
            decode_s = min(answer[clock] for answer in whole[name]) - prompt_s
            rates[f"prompt_tokens_per_{clock}"] = users * args.prompt_tokens / prompt_s
            rates[f"output_tokens_per_{clock}"] = users * args.output_tokens / decode_s
        tokens = whole[name][0]["tokens"]
        same = sum(a == b for a, b in zip(tokens, reference, strict=True))
        found[name] = {**rates, "users_with_the_reference's_tokens": same}
    return found


def logit_difference(file: str, num_tokens: int, seed: int) -> dict[str, float]:
    """Of the narrow model from the widened one, over random tokens."""
    import torch

    from hotset.model.checkpoint import load_gguf

    models = [
        load_gguf(Path(file), torch.device("cpu"), torch.float32, why_wide=why)[0].eval()
        for why in (None, "")
    ]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 40_000, (1, num_tokens), generator=generator)
    with torch.inference_mode():
        narrow, wide = (model(ids, use_cache=False).logits for model in models)
    return {
        "largest_logit": wide.abs().max().item(),
        "largest_difference": (narrow - wide).abs().max().item(),
        "same_top_token": (narrow.argmax(-1) == wide.argmax(-1)).float().mean().item(),
    }


def make_page(result: dict[str, Any]) -> str:
    rows = [
        {
            "users": users,
            "side": name,
            "prompt tokens/s": side["prompt_tokens_per_wall_s"],
            "prompt tokens per CPU s": side["prompt_tokens_per_cpu_s"],
            "output tokens/s": side["output_tokens_per_wall_s"],
            "output tokens per CPU s": side["output_tokens_per_cpu_s"],
            "users with the reference's tokens": side["users_with_the_reference's_tokens"],
        }
        for users, sides in result["users"].items()
        for name, side in sides.items()
    ]
    logits = result["logits"]
    return f"""# A GGUF file on a CPU

{result["file"]}, {result["threads"]} threads, prompts of {result["prompt_tokens"]} random tokens,
{result["output_tokens"]} tokens each, greedy; the least of {result["repeats"]} runs. The reference
is the widened model where it ran, else the narrow one.

{record.table(rows)}

Logits of the narrow model differ from the widened one's by at most
{logits["largest_difference"]:.1e}, the largest being {logits["largest_logit"]:.0f}; the top token
is the same in {logits["same_top_token"]:.2%} of places.

{record.footer(result)}"""


def main() -> None:
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    add_arguments(parser)
    parser.add_argument("--llama-python", help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--widened", action="store_true", help="time the widened model too")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.file is None:
        from hotset.model import default_model

        args.file = str(default_model.ensure_gguf())
    pythons = {"narrow": sys.executable}
    if args.widened:
        pythons["widened"] = sys.executable
    if args.llama_python:
        pythons["llama.cpp"] = args.llama_python
    sides = {name: Side(python, name, args) for name, python in pythons.items()}
    try:
        measured = {users: measure(sides, args, users) for users in (1, args.users)}
    finally:
        for side in sides.values():
            side.close()
    result = record.start(
        file=Path(args.file).name,
        threads=args.threads,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        repeats=args.repeats,
        seed=args.seed,
        users=measured,
        logits=logit_difference(args.file, args.prompt_tokens, args.seed),
    )
    print(json.dumps(result, indent=1))
    record.write(args.out, result, make_page(result))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", help="a .gguf file; the default model's where none is given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--users", type=int, default=16)


if __name__ == "__main__":
    if "--side" in sys.argv:  # may run where only llama-cpp-python is installed
        side_parser = argparse.ArgumentParser()
        side_parser.add_argument("--side", required=True)
        add_arguments(side_parser)
        run_side(side_parser.parse_args())
    else:
        import record

        main()
