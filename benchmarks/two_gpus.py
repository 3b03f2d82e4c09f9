"""One GPU against two of a host: decode steps of Llama-3.1-8B's shape, and experts in host memory.

Each call measures one part with one number of GPUs and prints what the planner says beside it, from
constants of one GPU and of links. On two H200 a call takes less than 200 s.

    for tp in 1 2; do for part in steps experts; do
        python benchmarks/two_gpus.py --tp $tp --part $part --out two_gpus_${part}_tp$tp.json
    done; done

`experts` has Qwen3-30B-A3B's shape with random weights and even routers: the same slots and KV in
all for any number of GPUs, so that only links differ. 256 requests of 512 + 32 tokens run with 51
of 128 experts of a layer on the device, decode steps of 16 users with 81.
"""

import random
import time
from collections.abc import Iterator
from contextlib import closing
from statistics import median
from typing import Any

import record
from engine_steps import STEPS, WARM_STEPS, step_s

from hotset.bench.campaign import load_part
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.expert_steps import ExpertCost, Load, link_of
from hotset.cost.hardware import load_hardware
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.load import load_on_ranks
from hotset.engine.run import run_to_end
from hotset.layout import Layout
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams

DENSE, EXPERTS = "llama-3-8b", "qwen3-30b-a3b"
CONTEXT = 1024
PROMPT, OUTPUT, REQUESTS = 512, 32, 256
KV_GIB = 16.0  # of all GPUs together, beside experts


def cost_model(name: str, tp: int) -> CostModel:
    """Of H200s, all experts resident."""
    hardware, calibration = load_hardware("h200"), CALIBRATIONS["hotset"]
    return CostModel(
        load_model(name, "bf16"), hardware, Layout(tp=tp), "bf16", calibration, Routing()
    )


def ready_engine(options: Options, loaded: LoadedModel) -> Engine:
    """With all steps recorded."""
    start_s = time.perf_counter()
    engine = build_engine(options, loaded)
    while engine.is_warming:
        engine.warm_up()
    print(f"engine ready in {time.perf_counter() - start_s:.1f} s", flush=True)
    print(engine.report, flush=True)
    return engine


def row(what: str, measured_s: float, predicted_s: float) -> dict[str, Any]:
    """Measured beside predicted; the error is above 0 where the prediction is too fast."""
    error = measured_s / predicted_s - 1
    print(
        f"{what}: measured {measured_s * 1e3:,.2f} ms, predicted {predicted_s * 1e3:,.2f} ms "
        f"({error:+.1%})",
        flush=True,
    )
    return {"what": what, "measured_s": measured_s, "predicted_s": predicted_s, "error": error}


def decode_steps(tp: int) -> Iterator[dict[str, Any]]:
    """Steps of 1, 64 and 256 users."""
    options = Options.of(
        tp=tp,
        model=DENSE,
        hot_gib=60.0 / tp,
        max_num_batched_tokens=1024,
        max_model_len=2 * CONTEXT,
        prefix_caching=False,
    )
    loaded = load_on_ranks(options, load_part, options, True, None, False)
    cost = cost_model(DENSE, tp)
    try:
        with closing(ready_engine(options, loaded)) as engine:
            for users in (1, 64, 256):
                seconds = step_s(engine, users, CONTEXT, random.Random(users))
                predicted_s = cost.decode(users, CONTEXT).expected_s
                yield row(f"{users} users of {CONTEXT} tokens", median(seconds), predicted_s)
    finally:
        close(loaded)


def expert_options(tp: int, slots: int) -> Options:
    """`expert_slots` experts of a layer on the device, all others in host memory."""
    return Options.of(
        tp=tp,
        model=EXPERTS,
        expert_slots=slots,
        hot_gib=KV_GIB / tp,
        max_num_batched_tokens=8192,
        max_model_len=2 * CONTEXT,
        prefix_caching=False,
    )


def expert_rows(tp: int) -> Iterator[dict[str, Any]]:
    """Requests at once, and decode steps of few users."""
    options = expert_options(tp, 51)
    loaded = load_on_ranks(options, load_part, options, True, 0.0, True)
    cost = cost_model(EXPERTS, tp)
    model = ExpertCost(cost, link_of(cost))
    try:
        with closing(ready_engine(options, loaded)) as engine:
            play(engine, 2)  # allocates
            load = Load(REQUESTS, PROMPT, OUTPUT, num_requests=REQUESTS)
            kv_tokens = engine.sizes.device_blocks * engine.sizes.block_size
            served = model.serve(51, load, kv_tokens=kv_tokens, max_step_tokens=8192)
            what = f"{REQUESTS} x {PROMPT}/{OUTPUT}, 51 of 128 experts on the device"
            yield row(what, play(engine, REQUESTS), served.prompt_s + served.decode_s)
        with closing(ready_engine(expert_options(tp, 81), loaded)) as engine:
            seconds = step_s(engine, 16, CONTEXT // 2, random.Random(16))
            step = model.decode_step(81, 16, CONTEXT // 2)
            what = "16 users, 81 of 128 experts on the device"
            yield row(what, median(seconds), step.seconds)
    finally:
        close(loaded)


def play(engine: Engine, num_requests: int) -> float:
    """Seconds from the first request to the last answer."""
    rng = random.Random(num_requests)
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    start_s = time.perf_counter()
    for _ in range(num_requests):
        engine.add_request(rng.choices(range(1000, 100_000), k=PROMPT), params)
    for output in run_to_end(engine):
        assert output.error is None, output.error
    return time.perf_counter() - start_s


def close(loaded: LoadedModel) -> None:
    """End the other ranks, if there are any."""
    if loaded.ranks is not None:
        loaded.ranks.close()


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--part", choices=("steps", "experts"), required=True)
    arguments = parser.parse_args()
    part = decode_steps if arguments.part == "steps" else expert_rows
    rows = list(part(arguments.tp))
    found = record.start(
        tp=arguments.tp, part=arguments.part, steps=[WARM_STEPS, STEPS], hardware="h200", rows=rows
    )
    record.write(arguments.out, found)


if __name__ == "__main__":
    main()
