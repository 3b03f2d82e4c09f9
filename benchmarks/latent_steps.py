"""Steps of DeepSeek-V3's attention at full width over cached latents, beside what the plan says.

A few of its layers, each with a small dense MLP, so that attention decides; with `--sparse` those
of DeepSeek-V3.2. Decode steps are the engine's own, over random latents. Beside them stand the
forward pass alone and the attention kernel alone. Chunks of prompts behind a context are timed as
the engine runs them, then launched once more with an event around each part. All steps together
take about half a minute; a machine's first run compiles the kernels before.

    python benchmarks/latent_steps.py --out benchmarks/results/latent_steps_h200.json   # an H200
    python benchmarks/latent_steps.py --sparse --out benchmarks/results/sparse_steps_h200.json
"""

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from device_parts import Parts, device_s
from engine_steps import STEPS, step_s
from transformers import AutoConfig, AutoModelForCausalLM

import hotset.bench
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.latent import LatentBackend
from hotset.attention.flashinfer.latent_rows import make_rows
from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.cost.attention import causal_pairs
from hotset.cost.catalog import bundled_config
from hotset.cost.loaded import make_cost_model
from hotset.cost.step_time import CostModel
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.executor.step_input import StepInput
from hotset.kernels.device import likely_hardware
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.sequence import Request

NUM_LAYERS, REPEATS, SEED = 4, 20, 0
CHANGES = {
    "num_hidden_layers": NUM_LAYERS,
    "first_k_dense_replace": NUM_LAYERS,
    "intermediate_size": 2048,
    "num_nextn_predict_layers": 0,
}
SPARSE = Path(hotset.bench.__file__).with_name("shapes") / "dsa-8l.json"
PROMPTS = ((256, 0), (1024, 0), (1024, 8192), (1024, 32768))
CLOSE = 0.1  # of the plan


def load(fields: dict[str, Any]) -> LoadedModel:
    """The model with random weights."""
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(SEED)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    name = fields["model_type"]
    return LoadedModel(model, None, name, "latent-steps", (), config.max_position_embeddings)


def fill(engine: Engine) -> None:
    """Random latents and index keys in all blocks."""
    arena = engine.executor.runner._arena
    for first in range(0, len(arena.storage), 1024):
        arena.storage[first : first + 1024].normal_()
    for keys in arena.index_keys:
        keys.normal_()


def one_step(engine: Engine, users: int, num_tokens: int, past: int) -> StepInput:
    """A step of `num_tokens` tokens behind a context for each user, over blocks in a row."""
    end, size = past + num_tokens, engine.sizes.block_size
    each = -(-end // size)
    items = []
    for user in range(users):
        request = Request(f"user-{user}", end, [1000] * end, SamplingParams(), end)
        request.kv.block_table = list(range(user * each, (user + 1) * each))
        items.append(StepItem.of(request, past, num_tokens))
    return make_step_input(Step(items), size)


def kernel_s(engine: Engine, users: int, context: int) -> float:
    """Seconds of the attention kernel in all layers of a decode step."""
    backend = engine.executor.runner._attention
    assert isinstance(backend, LatentBackend), type(backend)
    blocks = list(range(engine.sizes.num_blocks))
    random.Random(SEED).shuffle(blocks)
    each = -(-context // engine.sizes.block_size)
    tables = [blocks[user * each : (user + 1) * each] for user in range(users)]
    spans = [SequenceSpan(user, 1, context, table) for user, table in enumerate(tables)]
    rows = make_rows(spans)
    none = rows.lens[:0]
    planned = backend.plan(Batch(none, none, none, spans, users, False))
    num_heads = backend.weights[0].heads.shape[0]
    width = backend.rank + backend.rope_dim
    query = torch.randn(num_heads, users, width, device="cuda", dtype=torch.bfloat16)
    query = query.transpose(0, 1)
    output = torch.empty_like(query[..., : backend.rank])

    def run() -> None:
        for layer in range(NUM_LAYERS):
            planned.run(layer, query, output)

    return median(device_s(run, REPEATS))


def beside_the_plan(seconds: list[float], planned_s: float) -> dict[str, Any]:
    """A row's percentiles and its plan."""
    spread = record.percentiles(seconds, digits=6)
    measured = median(seconds)
    return {"step_s": measured, **spread, "planned_s": planned_s, "error": planned_s / measured - 1}


def decodes(
    engine: Engine, cost: CostModel, users: list[int], contexts: list[int]
) -> list[dict[str, Any]]:
    """A row per number of users and context that there is room for."""
    rng, rows = random.Random(SEED), []
    room = engine.sizes.device_blocks * engine.sizes.block_size
    is_sparse = isinstance(engine.executor.runner._attention, SparseBackend)
    for context in contexts:
        for count in users:
            if count * (context + STEPS + engine.sizes.block_size) > room:
                continue
            planned = cost.decode(count, context)
            row = {"users": count, "context": context, "planned_parts": planned.parts}
            row |= beside_the_plan(step_s(engine, count, context, rng), planned.expected_s)
            step = one_step(engine, count, 1, context - 1)
            row["forward_s"] = median(
                device_s(lambda step=step: engine.executor.runner.forward(step), REPEATS)
            )
            if not is_sparse:
                row["attention_s"] = kernel_s(engine, count, context)
            rows.append(row)
            record.say(
                f"{count:3} users, {context:6,} tokens: {row['step_s'] * 1e3:6.2f} ms, planned "
                f"{planned.expected_s * 1e3:6.2f} ({row['error']:+4.0%}); forward alone "
                f"{row['forward_s'] * 1e3:6.2f}; attention "
                f"{row.get('attention_s', 0.0) * 1e3:6.2f}, planned "
                f"{planned.parts['attention'] * 1e3:6.2f}"
            )
    return rows


def watch(backend: LatentBackend, parts: Parts) -> None:
    """Have the parts of launched prompts counted."""
    if isinstance(backend, SparseBackend):
        parts.watch(backend._scoring, "score_paged_keys", "score")
        parts.watch(backend, "_top_k", "select")
        parts.watch(backend._scoring, "find_rows", "list rows")
    else:
        expanded = backend.expanded
        parts.watch(expanded, "attend", "long prompts")
        parts.watch(expanded, "expand", "gather and expand")
        expanded.kernels = replace(
            expanded.kernels,
            gather=parts.watched(expanded.kernels.gather, "gather"),
            merge=parts.watched(expanded.kernels.merge, "merge"),
        )
        for wrapper in expanded._wrappers:
            parts.watch(wrapper, "run", "attention over keys")
    parts.watch(backend, "attend_part", "attention over latents")


def prompt_parts(cost: CostModel, backend: LatentBackend, tokens: int, past: int) -> dict[str, Any]:
    """What the plan says of the parts."""
    c, spec = cost.calibration, backend._spec
    attention_flops = cost._flops("bf16", c.attention_efficiency)
    if isinstance(backend, SparseBackend):
        scoring = causal_pairs(tokens, past) * cost.shape.index_pair_flops
        flops = cost.shape.prefill_attention_flops(tokens, past)
        return {
            "score": scoring / cost._flops("bf16", c.index_efficiency),
            "attention over latents": flops / attention_flops,
        }
    pairs = causal_pairs(tokens, past)
    product = spec.expanded_flops(0, past + tokens) / cost._flops("bf16", c.compute_efficiency)
    row_bytes = 2 * spec.token_values
    return {
        "gather": NUM_LAYERS * (past + tokens) * row_bytes * 2 / cost.memory_bytes_per_s,
        "gather and expand": NUM_LAYERS * product,
        "attention over keys": NUM_LAYERS * spec.expanded_flops(pairs, 0) / attention_flops,
    }


def prompts(engine: Engine, cost: CostModel) -> list[dict[str, Any]]:
    """A row per chunk of a prompt."""
    runner = engine.executor.runner
    backend = runner._attention
    assert isinstance(backend, LatentBackend)
    steps = {prompt: one_step(engine, 1, *prompt) for prompt in PROMPTS}
    rows: list[dict[str, Any]] = []
    for (tokens, past), step in steps.items():
        seconds = device_s(lambda step=step: runner.forward(step), REPEATS)
        start_s = time.perf_counter()
        runner.forward(step)
        host_s = time.perf_counter() - start_s
        torch.cuda.synchronize()
        row = {"tokens": tokens, "past": past, "host_s": host_s}
        rows.append(row | beside_the_plan(seconds, cost.prefill_s(tokens, past)))
    parts = Parts()
    watch(backend, parts)
    replays, runner.launches = runner.launches, lambda num_tokens: True  # a replay calls nothing
    for row, step in zip(rows, steps.values(), strict=True):
        row["launched_s"] = median(device_s(lambda step=step: runner.forward(step), REPEATS))
        row["parts_s"] = parts.take(REPEATS + 1)
        row["planned_parts_s"] = prompt_parts(cost, backend, row["tokens"], row["past"])
        record.say(
            f"{row['tokens']:5,} tokens after {row['past']:6,}: {row['step_s'] * 1e3:.2f} ms, "
            f"planned {row['planned_s'] * 1e3:.2f} ({row['error']:+.0%}); launched "
            f"{row['launched_s'] * 1e3:.2f}, submitted in {row['host_s'] * 1e3:.2f}"
        )
        for name, part_s in row["parts_s"].items():
            planned_s = row["planned_parts_s"].get(name)
            beside = "" if planned_s is None else f", planned {planned_s * 1e3:.2f}"
            record.say(f"    {name}: {part_s * 1e3:.2f} ms{beside}")
    runner.launches = replays
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many rows are as close to the plan as they should be, and the farthest."""
    errors = [row["error"] for row in rows]
    return {
        "rows": len(rows),
        "within_10_percent": sum(abs(error) <= CLOSE for error in errors),
        "largest": max(errors, key=abs, default=0.0),
    }


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--users", default="1,16,64,128,256")
    parser.add_argument("--contexts", default="1024,4096,16384,32768")
    parser.add_argument("--hot-gib", type=float, default=44.0)
    parser.add_argument("--sparse", action="store_true", help="DeepSeek-V3.2's layers")
    arguments = parser.parse_args()
    name = "deepseek-v3.2" if arguments.sparse else "deepseek-v3"
    base = json.loads(SPARSE.read_text("utf-8")) if arguments.sparse else bundled_config(name)[0]
    fields = {**base, **CHANGES}
    fields.pop("quantization_config", None)
    options = Options.of(
        hot_gib=arguments.hot_gib, max_num_batched_tokens=1024, prefix_caching=False
    )
    loaded = load(fields)
    record.say("weights made")
    engine = build_engine(options, loaded)
    fill(engine)
    record.say(f"engine built: {engine.report}")
    hardware = likely_hardware(torch.device("cuda"))
    cost = make_cost_model(fields, name, "bfloat16", hardware)
    users, contexts = (list(map(int, x.split(","))) for x in (arguments.users, arguments.contexts))
    decode_rows = decodes(engine, cost, users, contexts)
    prompt_rows = prompts(engine, cost)
    engine.close()
    found = record.start(
        model=name,
        changes=CHANGES,
        hardware=hardware.name,
        seed=SEED,
        kv_bytes_per_token=engine.sizes.block_bytes // engine.sizes.block_size,
        seconds=record.seconds(),
        decodes=decode_rows,
        prompts=prompt_rows,
        summary={"decodes": summary(decode_rows), "prompts": summary(prompt_rows)},
    )
    for kind, counts in found["summary"].items():
        record.say(
            f"{kind}: {counts['within_10_percent']} of {counts['rows']} within {CLOSE:.0%} of the "
            f"plan, largest difference {counts['largest']:+.0%}"
        )
    record.write(arguments.out, found)


if __name__ == "__main__":
    main()
