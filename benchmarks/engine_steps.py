"""How long decode steps of this engine take over a grid of users and contexts, on a GPU.

The steps are the engine's own: scheduling, model, sampling. Only the prompts are not computed:
their KV is random, so that the grid takes a minute and not an hour.

    python benchmarks/engine_steps.py --out benchmarks/results/engine_steps.json
    python benchmarks/planner_validation.py --measured benchmarks/results/engine_steps.json
"""

import random
import time
from statistics import median
from typing import Any

import record
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hotset.cost.catalog import bundled_config
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.run import run_steps
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.sequence import Request, RequestStatus

WARM_STEPS, STEPS = 6, 24
_TOKENS, _DRAWN = range(1000, 100_000), 1024


def dummy(name: str) -> LoadedModel:
    """A model of a bundled shape with random weights."""
    fields, _ = bundled_config(name)
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return LoadedModel(model, None, name, f"dummy-{name}", (), config.max_position_embeddings)


def step_s(engine: Engine, users: int, context: int, rng: random.Random) -> list[float]:
    """Seconds of each step of `users` requests that have about `context` tokens."""
    kv, params = engine.kv, SamplingParams(max_tokens=WARM_STEPS + STEPS, ignore_eos=True)
    half = (WARM_STEPS + STEPS) // 2
    drawn = rng.choices(_TOKENS, k=_DRAWN)  # a draw per token of each user would take seconds
    for i in range(users):
        first = rng.randrange(_DRAWN)  # else all users go on with one token, and its experts
        tokens = (drawn * -(-(first + context) // _DRAWN))[first : first + context - half]
        request = Request(
            f"{users}-{context}-{i}",
            len(tokens),
            tokens,
            params,
            len(tokens) + WARM_STEPS + STEPS,
        )
        request.kv.block_table = kv.pool.allocate(kv.tables.num_blocks_for(len(tokens)))
        if kv.states is not None:
            kv.states.slots.give(request, None)
        request.kv.num_computed_tokens = len(tokens) - 1
        request.status = RequestStatus.RUNNING
        engine._requests[request.request_id] = [request]
        engine._outputs.add(request)
        engine.scheduler.running.append(request)
    seconds: list[float] = []
    start_s = time.perf_counter()
    for _ in run_steps(engine, lambda: 0 if engine.has_work else None):
        end_s = time.perf_counter()
        seconds.append(end_s - start_s)
        start_s = end_s
    return seconds[WARM_STEPS:-1]


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--users", default="1,8,32,64,128,256")
    parser.add_argument("--contexts", default="512,1024,2048,3072")
    parser.add_argument("--hot-gib", type=float, default=100.0)
    arguments = parser.parse_args()
    config = Options.of(
        hot_gib=arguments.hot_gib, max_num_batched_tokens=1024, prefix_caching=False
    )
    engine = build_engine(config, dummy(arguments.model))
    storage = engine.executor.runner._arena.storage
    for first in range(0, len(storage), 1024):
        storage[first : first + 1024].normal_()
    rng = random.Random(0)
    steps: list[dict[str, Any]] = []
    for context in map(int, arguments.contexts.split(",")):
        for users in map(int, arguments.users.split(",")):
            if users * (context + STEPS) > engine.sizes.device_blocks * engine.sizes.block_size:
                continue
            seconds = step_s(engine, users, context, rng)
            p90_s = record.percentiles(seconds, of=[90], digits=6)["p90"]
            row = {"users": users, "context": context, "step_s": median(seconds), "p90_s": p90_s}
            steps.append(row)
            print(f"{users} users, {context} tokens: {median(seconds) * 1e3:.2f} ms", flush=True)
    engine.close()
    found = record.start(model=arguments.model, hardware="h200", seed=0, steps=steps)
    record.write(arguments.out, found)


if __name__ == "__main__":
    main()
