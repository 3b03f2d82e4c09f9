"""Copying blocks of an 8-bit cache into 16 bits."""

import torch
import triton
import triton.language as tl

_TILE = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _widen_kv(  # type: ignore[no-untyped-def]
    cache,
    block_ids,
    target,
    cache_stride_block,
    NUM_VALUES: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tl.program_id(0)
    block = tl.load(block_ids + place).to(tl.int64)
    if block >= 0:
        i = tl.program_id(1) * TILE + tl.arange(0, TILE)
        values = tl.load(cache + block * cache_stride_block + i, mask=i < NUM_VALUES)
        target += place.to(tl.int64) * NUM_VALUES
        tl.store(target + i, values.to(target.dtype.element_ty), mask=i < NUM_VALUES)


def widen_kv(cache: torch.Tensor, block_ids: torch.Tensor, target: torch.Tensor) -> None:
    """Convert one layer's keys and values of some blocks, in order, each exactly.

    Args:
        cache: `[num_blocks, 2, block_size, H, D]` float8_e4m3fn, a block contiguous.
        block_ids: `[N]` int32, contiguous; those below 0 are left out.
        target: `[N, 2, block_size, H, D]` float16 or bfloat16, contiguous. Mutated: the n-th block
            of `block_ids` becomes its n-th.

    Cost: each value read and written once, bound by bandwidth; a launch of N programs or more.
    Reference: `tests/kernels/test_widen_kv.py`, bit-exact.
    """
    num_values = target[0].numel()
    _widen_kv[(len(block_ids), triton.cdiv(num_values, _TILE))](
        cache,
        block_ids,
        target,
        cache.stride(0),
        NUM_VALUES=num_values,
        TILE=min(_TILE, triton.next_power_of_2(num_values)),
    )
