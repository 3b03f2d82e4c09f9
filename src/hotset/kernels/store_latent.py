"""Writing a step's latents and rotary keys into their cache rows."""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _store_latent(  # type: ignore[no-untyped-def]
    latent,
    rotary,
    cache,
    blocks,
    offsets,
    latent_stride,
    rotary_stride,
    cache_stride_block,
    cache_stride_row,
    RANK: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(blocks + token) * cache_stride_block
    row += tl.load(offsets + token) * cache_stride_row
    i = tl.arange(0, WIDTH)
    is_latent = i < RANK
    is_rotary = (i >= RANK) & (i < NUM_VALUES)
    c = tl.load(latent + token * latent_stride + i, mask=is_latent)
    k = tl.load(rotary + token * rotary_stride + i - RANK, mask=is_rotary)
    tl.store(cache + row + i, tl.where(is_latent, c, k), mask=i < NUM_VALUES)


def store_latent(
    latent: torch.Tensor,
    rotary: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Write one layer's new latents and their rotary keys into their rows, in place.

    T = tokens in this step, R = width of a latent, P = width of a rotary key.

    Args:
        latent: `[T, R]`, the last dimension contiguous.
        rotary: `[T, P]`, likewise.
        cache: `[num_blocks, block_size, R + P]`, the last dimension contiguous. Mutated. Of the
            dtype of `latent`.
        blocks: `[T]` int64, contiguous.
        offsets: `[T]` int64, contiguous. Places must be distinct, unless they are never read.

    Cost: each value read and written once, bound by bandwidth; one store per row.
    Reference: `tests/kernels/test_store_latent.py`, bit-exact.
    """
    num_tokens, rank = latent.shape
    num_values = rank + rotary.shape[1]
    _store_latent[(num_tokens,)](
        latent,
        rotary,
        cache,
        blocks,
        offsets,
        latent.stride(0),
        rotary.stride(0),
        cache.stride(0),
        cache.stride(1),
        RANK=rank,
        NUM_VALUES=num_values,
        WIDTH=triton.next_power_of_2(num_values),
    )
