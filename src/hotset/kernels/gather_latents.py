"""Gathering a piece of a context's latents, with their rotary keys beside the keys of all heads."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first"])  # type: ignore[untyped-decorator]
def _gather_latents(  # type: ignore[no-untyped-def]
    cache,
    block_table,
    first,
    latents,
    made,
    cache_stride_block,
    cache_stride_row,
    made_stride_token,
    made_stride_head,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    RANK_WIDTH: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    HEADS_WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = first + token
    block = tl.load(block_table + position // BLOCK_SIZE).to(tl.int64)
    row = cache + block * cache_stride_block + position % BLOCK_SIZE * cache_stride_row
    i = tl.arange(0, RANK_WIDTH)
    tl.store(latents + token * RANK + i, tl.load(row + i, mask=i < RANK), mask=i < RANK)
    i, head = tl.arange(0, ROPE_WIDTH)[None, :], tl.arange(0, HEADS_WIDTH)[:, None]
    is_inside = (i < ROPE_DIM) & (head < NUM_HEADS)
    rotary = tl.load(row + RANK + i, mask=i < ROPE_DIM)
    places = made + token * made_stride_token + head * made_stride_head + i
    tl.store(places, tl.broadcast_to(rotary, (HEADS_WIDTH, ROPE_WIDTH)), mask=is_inside)


def gather_latents(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    first: int,
    latents: torch.Tensor,
    made: torch.Tensor,
) -> None:
    """Copy the rows of S tokens of a context, in place: latents once, rotary keys to each head.

    R = width of a latent, P = width of a rotary key, H = heads.

    Args:
        cache: `[num_blocks, block_size, R + P]`, the last dimension contiguous.
        block_table: `[n]` int32, contiguous, the blocks of the context.
        first: position of the first of the S tokens.
        latents: `[S, R]`, contiguous, of the dtype of `cache`. Mutated.
        made: `[S, H, P or more]`, the last dimension contiguous, of that dtype, too. Mutated: the
            first P numbers of each head.

    Cost: `2R + (1 + H) P` numbers per token, bound by bandwidth.
    Reference: `tests/kernels/test_gather_latents.py`, bit-exact.
    """
    num_tokens, rank = latents.shape
    rope_dim, num_heads = cache.shape[-1] - rank, made.shape[1]
    _gather_latents[(num_tokens,)](
        cache,
        block_table,
        first,
        latents,
        made,
        cache.stride(0),
        cache.stride(1),
        made.stride(0),
        made.stride(1),
        BLOCK_SIZE=cache.shape[1],
        RANK=rank,
        ROPE_DIM=rope_dim,
        NUM_HEADS=num_heads,
        RANK_WIDTH=triton.next_power_of_2(rank),
        ROPE_WIDTH=triton.next_power_of_2(rope_dim),
        HEADS_WIDTH=triton.next_power_of_2(num_heads),
    )
