"""What index keys in 16 and in 8 bits cost on a GPU: to store a step's keys, and to score by them.

A layer of DeepSeek-V3.2's indexer, 64 heads of 128 numbers, and decodes with contexts of 33,792
tokens. Beside the time of scoring is the time that its bytes take at 4.13 TB/s, which an H200
reaches, and the time that its operations take at 350 TFLOP/s, which the plan assumes. Takes about
half a minute.

    python benchmarks/index_keys.py --out benchmarks/results/index_keys_h200.json
"""

import time
from typing import Any

import record
import torch
from device_parts import device_s

from hotset.cost.cache_spec import KeysValues, Latent
from hotset.kernels.index_scores import PagedTokens, score_paged_keys
from hotset.kernels.store_index import store_index
from hotset.linear.fp8 import FP8
from hotset.memory.arena import DeviceArena

BLOCK_SIZE, CONTEXT, SELECTED = 64, 33_792, 2048
HEADS, DIM, SEED = 64, 128, 0
USERS = (1, 16, 86)
NUM_REPEATS = 20
BYTES_PER_S, FLOPS = 4.13e12, 350e12


def measure(users: int, index_dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds of both launches of a layer."""
    num_blocks = users * CONTEXT // BLOCK_SIZE
    arena = DeviceArena(
        [Latent(16, 16, KeysValues(1, 16, 16))],  # so that the memory is nearly all of index keys
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        index_dims=[DIM],
        index_dtype=index_dtype,
    )
    keys, scales = arena.index_keys[0], arena.index_scales[0]
    if scales is None:
        keys[:num_blocks].normal_()
    else:
        keys[:num_blocks] = torch.randn(num_blocks, BLOCK_SIZE, DIM, device="cuda").to(FP8)
        scales[:num_blocks] = 1
    query = torch.randn(users, HEADS, DIM, device="cuda").bfloat16()
    key, turned = torch.randn(users, DIM, device="cuda").bfloat16(), torch.empty_like(query)
    weights = torch.randn(users, HEADS, device="cuda")
    tables = torch.randperm(num_blocks, device="cuda").int()
    starts = torch.arange(users, device="cuda", dtype=torch.int32) * (CONTEXT // BLOCK_SIZE)
    tokens = PagedTokens(tables, starts, torch.full_like(starts, CONTEXT))
    blocks, offsets = starts.long(), torch.zeros_like(starts, dtype=torch.int64)
    scores = torch.empty(users, CONTEXT, device="cuda")

    def store() -> None:
        if scales is None:
            keys[blocks, offsets] = key
        else:
            store_index(query, key, turned, keys, scales, blocks, offsets)

    def score() -> None:
        score_paged_keys(query, weights, keys, tokens, scores, count=SELECTED, key_scales=scales)

    token_bytes = (arena.runs(0)[-1][-1]) // BLOCK_SIZE
    num_pairs = users * CONTEXT
    return {
        "users": users,
        "keys": str(index_dtype).removeprefix("torch."),
        "bytes_per_token": token_bytes,
        **_times("store", device_s(store, NUM_REPEATS)),
        **_times("score", device_s(score, NUM_REPEATS)),
        "us_of_bytes": round(num_pairs * token_bytes / BYTES_PER_S * 1e6, 1),
        "us_of_operations": round(2 * HEADS * DIM * num_pairs / FLOPS * 1e6, 1),
    }


def _times(name: str, seconds: list[float]) -> dict[str, float]:
    found = record.percentiles(seconds, scale=1e6)
    return {f"us_{name}_{percentile}": value for percentile, value in found.items()}


def main() -> None:
    arguments = record.arguments(__doc__).parse_args()
    started_s = time.perf_counter()
    torch.manual_seed(SEED)
    found = [measure(users, dtype) for users in USERS for dtype in (torch.bfloat16, FP8)]
    taken_s = round(time.perf_counter() - started_s, 1)
    record.write(arguments.out, record.start(seed=SEED, seconds=taken_s, rows=found))
    print(record.table(found))
    print(f"{taken_s} s")


if __name__ == "__main__":
    main()
