"""How many steps, and of what, the scheduler makes of a workload for a GPU; no GPU is needed.

Engine, scheduler, KV cache and the bookkeeping of tiers are the real ones, with as many blocks as
presets C and B give Llama-3.1-8B. The model computes nothing, and copies take no time: those to and
from host memory end before the next step. Each step is
charged what its parts took on an H200 (`benchmarks/results/gpu_h200.md`, D): products by
rows, KV of decodes at 3.75 TB/s, prompts' attention at 300 TFLOP/s beside it. So the seconds are
arithmetic, good for comparing schedules; a real run is 4 % longer with tiers, and 11 without them.

    python benchmarks/play_schedule.py --presets C6,C3 --out benchmarks/results/play_schedule.json
    python benchmarks/play_schedule.py --presets C6 --mixed-tokens 1024,2048 --out FILE
    python benchmarks/play_schedule.py --presets B --mixed-tokens 1024 --rotation-s 0,1 --out FILE
    python benchmarks/play_schedule.py --presets "" --disk-under 500,929,1400 --out FILE

`--presets` takes those of `hotset bench`, and `demo`, the shape of `hotset demo`.
`--disk-under` plays users who take turns (24 as in `hotset demo`, 371 blocks on the device, in all
contexts of about 1,700) with so many blocks of host memory and a real disk tier below, whose reads
are counted.
"""

import tempfile
import time
from bisect import bisect_left
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import record
from played import make_engine
from transformers import LlamaConfig

from hotset.bench.driver import drive
from hotset.bench.presets import PRESETS
from hotset.bench.workload import Spec, make_work
from hotset.engine.engine import Engine
from hotset.executor.step_input import StepInput
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import capacity_bytes_for
from hotset.metrics import Metrics
from hotset.model.dummy import load_dummy
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.units import GIB

BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * 2 * 16 * 4  # of the stand-in
HOT_BLOCKS, HOST_BLOCKS = 8192, 32768  # 16 and 64 GiB of Llama-3.1-8B
ALL_BLOCKS = 52000  # about what is free beside its weights
KV_BYTES = 131072  # of a token
DEMO = Spec("multiturn", 24, 4, first_tokens=950, new_tokens=35, output_tokens=25, seed=5)
DEMO_BLOCKS = 371
QUERY_FLOP = 4 * 4096 * 32  # of a token and one that it attends to
VOCAB_SIZE = 4000

# Rows of a step -> ms of all that is recorded of it; the fastest size that holds so many rows.
MIXED_MS = {
    **{16: 5.37, 32: 5.39, 64: 5.47, 128: 5.78, 192: 6.67, 256: 7.41, 320: 8.75, 384: 9.7},
    **{512: 12.27, 640: 15.22, 768: 18.75, 896: 21.28, 1024: 22.39, 1280: 29.45, 1536: 35.59},
    **{1792: 41.27, 2048: 45.63},
}
DECODE_MS = {1: 4.87, 16: 5.01, 64: 5.53, 96: 5.94, 128: 6.35, 160: 6.89, 192: 7.7, 256: 8.66}


def products_ms(table: dict[int, float], rows: int) -> float:
    """From the table; steps beyond it take as long a row as its largest."""
    sizes = sorted(table)
    if rows > sizes[-1]:
        return table[sizes[-1]] * rows / sizes[-1]
    return table[sizes[bisect_left(sizes, rows)]]


def step_s(step: StepInput) -> float:
    """What a step is charged."""
    n, spans = step.batch.num_decodes, step.batch.sequences
    decode_ms = sum(span.context_len for span in spans[:n]) * KV_BYTES / 3.75e9
    if n == len(spans):
        return (products_ms(DECODE_MS, step.num_tokens) + decode_ms + 0.4) / 1e3
    pairs = sum(one.num_tokens * (one.context_len - one.num_tokens / 2) for one in spans[n:])
    prompt_ms = pairs * QUERY_FLOP / 300e9 + 0.3
    beside_ms = max(decode_ms, prompt_ms) + 0.3 * min(decode_ms, prompt_ms)
    return (products_ms(MIXED_MS, step.num_tokens) + beside_ms) / 1e3


TRIALS = [(rows, MIXED_MS[rows] / 1e3) for rows in (32, 256)]


def make_model() -> LoadedModel:
    """Something to make an engine of."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return load_dummy(folder, device="cpu", dtype="float32")


def run(engine: Engine, spec: Spec) -> Metrics:
    """Play a workload and close the engine."""
    driven = drive(engine, make_work(spec, VOCAB_SIZE))
    engine.close()
    assert driven.is_complete
    return engine.metrics


def play(
    spec: Spec,
    loaded: LoadedModel,
    *,
    hot_blocks: int,
    has_host: bool,
    mixed_tokens: int,
    row_tile: int,
    rotation_s: float | None,
) -> dict[str, Any]:
    """One workload through a fresh engine."""
    decode_shares: list[float] = []  # of all blocks

    def take(step: StepInput) -> float:
        decodes = step.batch.sequences[: step.batch.num_decodes]
        decode_shares.append(sum(len(span.block_table) for span in decodes) / hot_blocks)
        return step_s(step)

    engine, executor = make_engine(
        Options.of(
            device="cpu",
            dtype="float32",
            hot_gib=(hot_blocks + 0.5) * BLOCK_BYTES / GIB,
            host_gib=HOST_BLOCKS * slot_bytes_for(BLOCK_BYTES) / GIB if has_host else 0.0,
            max_num_batched_tokens=8192,
            max_mixed_tokens=mixed_tokens,
            max_model_len=min(8192, hot_blocks * BLOCK_TOKENS),
            rotation_s=rotation_s,
        ),
        loaded,
        take,
        vocab_size=VOCAB_SIZE,
        trials=TRIALS,
        row_tile=row_tile,
    )
    metrics = run(engine, spec)
    first_tokens_s = {request_id: times[0] for request_id, times in engine.tokens_s.items()}
    ttft_s = [first_s - engine.sent_s[one] for one, first_s in first_tokens_s.items()]
    return {
        "steps": metrics.steps,
        "seconds": round(sum(executor.seconds), 2),
        "decode_block_share_p50": round(median(decode_shares), 3),
        "computed_tokens": metrics.computed_tokens,
        "recomputed_tokens": metrics.recomputed_tokens,
        "first_token_s_p99": record.percentiles([*first_tokens_s.values()], digits=2)["p99"],
        "ttft_s": {
            "mean": round(fmean(ttft_s), 2),
            **record.percentiles(ttft_s, of=(10, 50, 90, 99), digits=2),
        },
        "preemptions": metrics.preemptions,
        "fetched_blocks": metrics.fetched_blocks,
    }


def play_over_disk(loaded: LoadedModel, host_blocks: int) -> dict[str, Any]:
    """Users who take turns, all of whose contexts are on disk; steps take 20 ms."""
    slot_bytes = slot_bytes_for(BLOCK_BYTES)

    def take(step: StepInput) -> float:
        time.sleep(0.02)  # the disk is real
        return 0.02

    with tempfile.TemporaryDirectory() as folder:
        engine, _ = make_engine(
            Options.of(
                device="cpu",
                dtype="float32",
                hot_gib=(DEMO_BLOCKS + 0.5) * BLOCK_BYTES / GIB,
                host_gib=host_blocks * slot_bytes / GIB,
                disk_gib=(capacity_bytes_for(2320, slot_bytes) + 1) / GIB,
                disk_path=Path(folder),
                max_model_len=2048,
                fetch_policy="fetch",
            ),
            loaded,
            take,
            vocab_size=VOCAB_SIZE,
            trials=TRIALS,
            row_tile=1,
        )
        metrics = run(engine, DEMO)
    return {
        "computed_tokens": metrics.computed_tokens,
        "fetched_blocks": metrics.fetched_blocks,
        "blocks_read_from_disk": metrics.moved_bytes["disk>host"] // BLOCK_BYTES,
    }


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--presets", default="C6,C3")
    parser.add_argument("--mixed-tokens", default="1024,2048")
    parser.add_argument("--row-tiles", default="1,256")
    parser.add_argument("--rotation-s", default="0", help="With host memory; 0 is off.")
    parser.add_argument("--disk-under", default="", help="Blocks of host memory.")
    arguments = parser.parse_args()
    loaded = make_model()
    found = record.start(runs=[])
    for name, has_host, mixed_tokens, row_tile, rotation_s in product(
        filter(None, arguments.presets.split(",")),
        (True, False),
        map(int, arguments.mixed_tokens.split(",")),
        map(int, arguments.row_tiles.split(",")),
        map(float, arguments.rotation_s.split(",")),
    ):
        if rotation_s and not has_host:
            continue
        options = {
            "has_host": has_host,
            "mixed_tokens": mixed_tokens,
            "row_tile": row_tile,
            "rotation_s": rotation_s or None,
        }
        if name == "demo":
            spec, hot_blocks = DEMO, DEMO_BLOCKS
        else:
            spec = PRESETS[name].spec
            hot_blocks = ALL_BLOCKS if PRESETS[name].hot_gib is None else HOT_BLOCKS
        played = play(spec, loaded, hot_blocks=hot_blocks, **options)
        found["runs"].append({"preset": name, "seed": spec.seed, **options, **played})
        print(found["runs"][-1], flush=True)
    for host_blocks in map(int, filter(None, arguments.disk_under.split(","))):
        found["runs"].append({"host_blocks": host_blocks, **play_over_disk(loaded, host_blocks)})
        print(found["runs"][-1], flush=True)
    record.write(arguments.out, found)


if __name__ == "__main__":
    main()
