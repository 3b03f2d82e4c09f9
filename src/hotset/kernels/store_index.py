"""Writing a step's index keys to their places as 8-bit floats, and turning the queries for them."""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _store_index(  # type: ignore[no-untyped-def]
    query,
    key,
    turned,
    keys,
    scales,
    blocks,
    offsets,
    key_stride,
    keys_stride_block,
    keys_stride_slot,
    scales_stride_block,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)
    # A Hadamard matrix: -1 where two indices have an odd number of bits in common.
    common = d[:, None] & d[None, :]
    common ^= common >> 8
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    signs = 1.0 - 2.0 * (common & 1).to(tl.float32)

    head = tl.arange(0, HEADS)
    is_head = head[:, None] < NUM_HEADS
    at = (token * NUM_HEADS + head[:, None]) * DIM + d[None, :]
    q = tl.load(query + at, mask=is_head, other=0.0)
    q = tl.dot(q, signs.to(q.dtype), input_precision="ieee") * (1.0 / DIM)
    tl.store(turned + at, q.to(turned.dtype.element_ty), mask=is_head)

    k = tl.load(key + token * key_stride + d).to(tl.float32)
    k = tl.sum(k[:, None] * signs, axis=0)
    largest = tl.maximum(tl.max(tl.abs(k), axis=0), 1e-4)
    # The least power of two that takes it to 448, which is 1.75 * 2**8, or less.
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    k = k * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # The conversion of some GPUs turns what is too large into NaN.
    k = tl.clamp(k, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    block, offset = tl.load(blocks + token), tl.load(offsets + token)
    tl.store(keys + block * keys_stride_block + offset * keys_stride_slot + d, k)
    tl.store(scales + block * scales_stride_block + offset, scale)


def store_index(
    query: torch.Tensor,
    key: torch.Tensor,
    turned: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Write one layer's new index keys to their places, in place, and turn the queries.

    T = tokens in this step, H_i = heads of the indexer, D = width of a key.

    Args:
        query: `[T, H_i, D]`, contiguous; D a power of 2 from 16 to 2**15.
        key: `[T, D]`, the last dimension contiguous; of the dtype of `query`.
        turned: `[T, H_i, D]`, contiguous; of the dtype of `query`. Mutated: what scores the stored
            keys as `query` scores keys.
        keys: `[num_blocks, block_size, D]` float8_e4m3fn, the last dimension contiguous. Mutated.
        scales: `[num_blocks, block_size]` float32, the last dimension contiguous. Mutated.
        blocks: `[T]` int64, contiguous.
        offsets: `[T]` int64, contiguous. Places must be distinct, unless they are never read.

    Cost: 2 * H_i * D * D operations per token; one launch.
    Reference: `hotset.attention.sparse.rounded`, equal up to the order of sums.
    """
    num_tokens, num_heads, dim = query.shape
    _store_index[(num_tokens,)](
        query,
        key,
        turned,
        keys,
        scales,
        blocks,
        offsets,
        key.stride(0),
        keys.stride(0),
        keys.stride(1),
        scales.stride(0),
        NUM_HEADS=num_heads,
        HEADS=max(16, triton.next_power_of_2(num_heads)),
        DIM=dim,
        num_warps=8,  # a matrix of 128 by 128 lies in registers
    )
