"""Steps of a model that keeps a state beside KV, beside the bytes that they must move.

Weights are random, made on the device, and use all experts alike. Decode steps are the engine's
own, with its scheduler and sampler; prompts are one step each. Kernels of the state layers are
timed alone, too. No more sizes of steps are recorded than are timed, so that a run takes two
minutes.

    python benchmarks/hybrid_steps.py --out benchmarks/results/hybrid_steps_h200.json   # an H200
    python benchmarks/hybrid_steps.py --experts host --users 1,16,64 --out FILE
    python benchmarks/hybrid_steps.py --model qwen3-next-80b-a3b --layers 24 --out FILE
"""

import inspect
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
import torch
from engine_steps import STEPS, step_s
from transformers.models.qwen3_next import modeling_qwen3_next

from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.scans import Convolution, GatedDelta
from hotset.attention.state_step import StateLayers
from hotset.cost.catalog import find_config
from hotset.cost.loaded import make_cost_model
from hotset.cost.step_time import CostModel, Tiering
from hotset.cost.tuning import TUNINGS
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.experts.router_skew import skew_routers
from hotset.experts.weights import experts_layers
from hotset.kernels.device import likely_hardware
from hotset.model.dummy import load_dummy
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.sequence import PADDING_SLOT, Request

SEED, REPEATS = 0, 10
TOKENS = range(1000, 100_000)


def timed(run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Seconds of each of `repeats` calls, each awaited, after one more."""
    seconds: list[float] = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    return seconds[1:]


def beside_the_bytes(seconds: list[float], bytes_s: float, planned_s: float) -> dict[str, Any]:
    """A row's percentiles, the time that its bytes take, and its plan."""
    measured = median(seconds)
    return {
        "step_s": measured,
        **record.percentiles(seconds, digits=6),
        "bytes_s": bytes_s,
        "over_bytes": measured / bytes_s,
        "planned_s": planned_s,
        "error": planned_s / measured - 1,
    }


def moved_s(cost: CostModel, users: int, context: int, tiering: Tiering) -> dict[str, float]:
    """Seconds that the bytes of a decode step take at the rates that kernels reach, by kind."""
    work = cost._decode_work(users, users, context)
    missed = work["experts"].moved_bytes * (1 - tiering.resident_experts)
    state_bytes = 2 * users * cost.shape.kv_bytes(0, cost.kv_dtype)
    moved = {
        "weights": work["dense_weights"].moved_bytes,
        "experts": work["experts"].moved_bytes,
        "state": state_bytes,
        "kv": work["attention"].moved_bytes - state_bytes,
    }
    seconds = {name: size / cost.memory_bytes_per_s for name, size in moved.items()}
    return seconds | {"link": missed / cost.expert_bytes_per_s()}


def decodes(
    engine: Engine, cost: CostModel, tiering: Tiering, users: list[int], contexts: list[int]
) -> list[dict[str, Any]]:
    """A row per number of users and context that there is room for."""
    rng, rows = random.Random(SEED), []
    assert engine.sizes.states is not None
    room = engine.sizes.device_blocks * engine.sizes.block_size
    for context in contexts:
        for count in users:
            needed = count * (context + STEPS + engine.sizes.block_size)
            if needed > room or count > engine.sizes.states.num_seqs:
                record.say(f"{count} users, {context:,} tokens: no room")
                continue
            parts = moved_s(cost, count, context, tiering)
            planned = cost.decode(count, context, tiering)
            # What comes over the link can come while the rest is read.
            bytes_s = max(parts["link"], sum(parts.values()) - parts["link"])
            row = {"users": count, "context": context, "bytes_parts_s": parts}
            row |= {"planned_parts_s": planned.parts}
            row |= beside_the_bytes(
                step_s(engine, count, context, rng), bytes_s, planned.expected_s
            )
            rows.append(row)
            record.say(
                f"{count:3} users, {context:6,} tokens: {row['step_s'] * 1e3:6.2f} ms (p90 "
                f"{row['p90'] * 1e3:.2f}), {row['over_bytes']:.2f} times its bytes' "
                f"{bytes_s * 1e3:.2f}, planned {planned.expected_s * 1e3:.2f} ({row['error']:+.0%})"
            )
    return rows


def prompts(
    engine: Engine, cost: CostModel, tiering: Tiering, lengths: list[int]
) -> list[dict[str, Any]]:
    """A row per prompt, each one step."""
    rows, size, rng = [], engine.sizes.block_size, random.Random(SEED)
    for num_tokens in lengths:
        tokens = rng.choices(TOKENS, k=num_tokens)  # of one token all go to the same experts
        request = Request("prompt", num_tokens, tokens, SamplingParams(), num_tokens)
        request.kv.block_table = list(range(-(-num_tokens // size)))
        step = make_step_input(Step([StepItem.of(request, 0, num_tokens)]), size)
        seconds = timed(lambda step=step: engine.executor.runner.forward(step), 5)
        planned_s = cost.prefill_s(num_tokens, tiering=tiering)
        row = {"tokens": num_tokens, "step_s": median(seconds), "planned_s": planned_s}
        rows.append(row | record.percentiles(seconds, digits=6))
        record.say(
            f"a prompt of {num_tokens:,} tokens: {row['step_s'] * 1e3:.2f} ms, planned "
            f"{planned_s * 1e3:.2f}, {num_tokens / row['step_s']:,.0f} tokens/s"
        )
    return rows


def delta_rows(config: Any, num_tokens: int, like: torch.Tensor) -> GatedDelta | None:
    """Tokens of the gated delta rule; None where the model has another recurrence."""
    if not hasattr(config, "linear_num_key_heads"):
        return None
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    values = (config.linear_num_value_heads, config.linear_value_head_dim)
    query, key = torch.randn(2, num_tokens, heads, keys, device=like.device).to(like.dtype)
    value = torch.randn(num_tokens, *values, device=like.device).to(like.dtype)
    decay = -torch.rand(num_tokens, values[0], device=like.device) / 20
    beta = torch.rand(num_tokens, values[0], device=like.device).to(like.dtype)
    original = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    return GatedDelta(query, key, value, decay, beta, True, original)


def state_kernels(
    engine: Engine, cost: CostModel, users: list[int], lengths: list[int]
) -> list[dict[str, Any]]:
    """The state layers' kernels alone, over all layers: decodes of users, and prompts."""
    runner, rows = engine.executor.runner, []
    arena, config = runner._states, runner._model.config.get_text_config()
    assert arena is not None
    layers, device = StateLayers(arena, {}, arena.memory.device), arena.memory.device
    none, rate = np.empty(0, np.int64), cost.memory_bytes_per_s
    for is_decode, count in [*((True, x) for x in users), *((False, x) for x in lengths)]:
        first = PADDING_SLOT + 1
        if is_decode and first + count > len(arena.memory):
            continue
        spans = [SequenceSpan(0, count, count, [], 0, first)]
        if is_decode:
            spans = [SequenceSpan(i, 1, 9, [], first + i, first + i) for i in range(count)]
        batch = Batch(none, none, none, spans, count if is_decode else 0, False)
        columns = next(iter(arena.columns.values()))
        scan = delta_rows(config, count, columns)
        if scan is None:
            return rows
        values = torch.randn(count, columns.shape[1], device=device).to(columns.dtype).T
        weight = torch.randn(columns.shape[1], columns.shape[2] + 1, device=device).to(values.dtype)
        convolution = Convolution(values, weight, None, "silu")
        states = layers.begin_step(batch)
        convolve_s = median(
            timed(
                lambda states=states, convolution=convolution: [
                    states.convolve(layer, convolution) for layer in arena.columns
                ]
            )
        )
        scan_s = median(
            timed(
                lambda states=states, scan=scan: [
                    states.scan(layer, scan) for layer in arena.recurrent
                ]
            )
        )
        kind = "decodes" if is_decode else "tokens of a prompt"
        row = {"kind": kind, "count": count, "convolve_s": convolve_s, "scan_s": scan_s}
        row["bytes_s"] = 2 * (count if is_decode else 1) * arena.slot_bytes / rate
        rows.append(row)
        record.say(
            f"state layers, {count:,} {kind}: convolutions {convolve_s * 1e3:.2f} ms, scans "
            f"{scan_s * 1e3:.2f}, states' bytes {row['bytes_s'] * 1e3:.2f}"
        )
    return rows


def load(arguments: Any) -> tuple[dict[str, Any], str, Any]:
    """The config's fields, with fewer layers if asked for, a name, and the model."""
    fields, name, _ = find_config(arguments.model)
    if arguments.layers is not None:
        fields = {**fields, "num_hidden_layers": arguments.layers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(name).stem}.json"
        path.write_text(json.dumps(fields), "utf-8")
        loaded = load_dummy(
            str(path),
            device=arguments.device,
            dtype="auto",
            seed=SEED,
            experts_on_host=arguments.experts == "host",
        )
    if experts_layers(loaded.model) and not fields.get("tie_word_embeddings"):
        skew_routers(loaded.model, 0.0, seed=SEED)
    return fields, name, loaded


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--model", default="qwen3.6-35b-a3b")
    parser.add_argument("--layers", type=int, help="as many of its layers")
    parser.add_argument("--users", default="1,16,64,256")
    parser.add_argument("--contexts", default="1024,4096")
    parser.add_argument("--prompts", default="8192")
    parser.add_argument("--hot-gib", type=float, default=40.0)
    parser.add_argument("--experts", choices=["resident", "host"], default="resident")
    parser.add_argument("--expert-gib", type=float, default=20.0, help="with --experts host")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    users, contexts, lengths = (
        [int(x) for x in text.split(",")]
        for text in (arguments.users, arguments.contexts, arguments.prompts)
    )
    TUNINGS["cuda"] = replace(TUNINGS["cuda"], decode_sizes=tuple(users), mixed_sizes=(16,))
    fields, name, loaded = load(arguments)
    record.say("weights made")
    # Memory for KV is not shared with experts: all are resident, or those that fit into theirs.
    experts = {"expert_gib": arguments.expert_gib}
    if arguments.experts == "resident":
        num_experts = fields.get("num_experts")
        experts = {} if num_experts is None else {"expert_slots": num_experts}
    options = Options.of(
        device=arguments.device,
        hot_gib=arguments.hot_gib,
        max_num_seqs=max(users),
        max_num_batched_tokens=max(lengths),
        max_model_len=max(*lengths, max(contexts) + STEPS) + 64,
        prefix_caching=False,
        **experts,
    )
    # Kernels of prompts that take a minute to compile are not waited for; decodes do without.
    engine = build_engine(options, loaded, defers_recording=True)
    record.say(f"engine built: {engine.report}")
    while engine.is_warming and engine.warm_up()[0]:
        pass
    record.say("decode steps recorded")
    hardware = likely_hardware(torch.device(arguments.device))
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    cost = make_cost_model(fields, name, dtype, hardware)
    buffer = engine.executor._experts
    resident = 1.0 if buffer is None else buffer.num_slots / buffer.sizes.num_experts
    tiering = Tiering(resident_experts=resident)
    found = record.start(
        model=name,
        layers=len(cost.shape.layers),
        experts=arguments.experts,
        resident_experts=resident,
        hardware=hardware.name,
        seed=SEED,
        slot_bytes=engine.sizes.states.slot_bytes,
        kv_bytes_per_token=engine.sizes.block_bytes // engine.sizes.block_size,
        kernels=state_kernels(engine, cost, users, lengths),
        decodes=decodes(engine, cost, tiering, users, contexts),
        has_all_kernels=not engine.is_warming or engine.warm_up()[0],
        prompts=prompts(engine, cost, tiering, lengths),
    )
    engine.close()
    record.write(arguments.out, found | {"seconds": record.seconds()})


if __name__ == "__main__":
    main()
