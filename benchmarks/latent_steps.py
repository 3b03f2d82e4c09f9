"""Steps of DeepSeek-V3's attention at full width over cached latents, beside what the plan says.

A few of its layers, each with a small dense MLP, so that attention decides. Decode steps are the
engine's own, over random latents; the attention kernel is timed alone, too, and chunks of a prompt
behind a context.

    python benchmarks/latent_steps.py --out benchmarks/results/latent_steps_h200.json   # an H200
"""

import random
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import record
import torch
from engine_steps import STEPS, step_s
from transformers import AutoConfig, AutoModelForCausalLM

from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.latent import LatentBackend
from hotset.attention.flashinfer.latent_rows import make_rows
from hotset.cost.catalog import bundled_config
from hotset.cost.loaded import make_cost_model
from hotset.cost.step_time import CostModel
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.kernels.device import likely_hardware
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.sequence import Request

NUM_LAYERS, REPEATS = 4, 20
CHANGES = {
    "num_hidden_layers": NUM_LAYERS,
    "first_k_dense_replace": NUM_LAYERS,
    "intermediate_size": 2048,
    "num_nextn_predict_layers": 0,
}
PROMPTS = ((256, 0), (1024, 0), (1024, 8192), (1024, 32768))


def load(fields: dict[str, Any]) -> LoadedModel:
    """The model with random weights."""
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return LoadedModel(
        model, None, "deepseek-v3", "latent-steps", (), config.max_position_embeddings
    )


def seconds(run: Callable[[], object]) -> float:
    """The median time that the device takes for `run`."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return median(one.elapsed_time(other) for one, other in pairwise(events)) / 1e3


def kernel_s(engine: Engine, users: int, context: int) -> float:
    """Seconds of the attention kernel in all layers of a decode step."""
    backend = engine.executor.runner._attention
    assert isinstance(backend, LatentBackend), type(backend)
    blocks = list(range(engine.sizes.num_blocks))
    random.Random(0).shuffle(blocks)
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

    return seconds(run)


def prompt_s(engine: Engine, num_tokens: int, past: int) -> float:
    """Seconds of a step of one prompt's tokens behind a context."""
    end = past + num_tokens
    request = Request("prompt", end, [1000] * end, SamplingParams(), end)
    request.kv.block_table = list(range(-(-end // engine.sizes.block_size)))
    step = make_step_input(Step([StepItem.of(request, past, num_tokens)]), engine.sizes.block_size)
    return seconds(lambda: engine.executor.runner.forward(step))


def decodes(
    engine: Engine, cost: CostModel, users: list[int], contexts: list[int]
) -> list[dict[str, Any]]:
    """A row per number of users and context that there is room for."""
    rng, rows = random.Random(0), []
    room = engine.sizes.device_blocks * engine.sizes.block_size
    for context in contexts:
        for count in users:
            if count * (context + STEPS + engine.sizes.block_size) > room:
                continue
            measured = median(step_s(engine, count, context, rng))
            planned = cost.decode(count, context)
            row = {
                "users": count,
                "context": context,
                "step_s": measured,
                "planned_s": planned.expected_s,
                "planned_parts": planned.parts,
                "attention_s": kernel_s(engine, count, context),
            }
            rows.append(row)
            print(
                f"{count} users, {context} tokens: {measured * 1e3:.2f} ms, planned "
                f"{planned.expected_s * 1e3:.2f}; attention {row['attention_s'] * 1e3:.2f}, "
                f"planned {planned.parts['attention'] * 1e3:.2f}",
                flush=True,
            )
    return rows


def prompts(engine: Engine, cost: CostModel) -> list[dict[str, Any]]:
    """A row per chunk of a prompt."""
    rows = []
    for num_tokens, past in PROMPTS:
        measured, planned = prompt_s(engine, num_tokens, past), cost.prefill_s(num_tokens, past)
        rows.append({"tokens": num_tokens, "past": past, "step_s": measured, "planned_s": planned})
        print(
            f"{num_tokens} tokens after {past}: {measured * 1e3:.2f} ms, planned "
            f"{planned * 1e3:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--users", default="1,16,64,128,256")
    parser.add_argument("--contexts", default="1024,4096,16384,32768")
    parser.add_argument("--hot-gib", type=float, default=44.0)
    arguments = parser.parse_args()
    fields = {**bundled_config("deepseek-v3")[0], **CHANGES}
    fields.pop("quantization_config", None)
    options = Options.of(
        hot_gib=arguments.hot_gib, max_num_batched_tokens=1024, prefix_caching=False
    )
    engine = build_engine(options, load(fields))
    print(engine.report, flush=True)
    storage = engine.executor.runner._arena.storage
    for first in range(0, len(storage), 1024):
        storage[first : first + 1024].normal_()
    hardware = likely_hardware(torch.device("cuda"))
    cost = make_cost_model(fields, "deepseek-v3", "bfloat16", hardware)
    users, contexts = (list(map(int, x.split(","))) for x in (arguments.users, arguments.contexts))
    found = record.start(
        model="deepseek-v3",
        changes=CHANGES,
        hardware=hardware.name,
        seed=0,
        kv_bytes_per_token=engine.sizes.block_bytes // engine.sizes.block_size,
        decodes=decodes(engine, cost, users, contexts),
        prompts=prompts(engine, cost),
    )
    engine.close()
    record.write(arguments.out, found)


if __name__ == "__main__":
    main()
