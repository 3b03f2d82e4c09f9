"""Writing a step's keys and values into their cache slots."""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _store_kv(  # type: ignore[no-untyped-def]
    key,
    value,
    cache,
    blocks,
    offsets,
    key_stride_head,
    key_stride_token,
    value_stride_head,
    value_stride_token,
    cache_stride_block,
    cache_stride_value,
    cache_stride_slot,
    key_factor,
    value_factor,
    NUM_VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(blocks + token) * cache_stride_block
    slot += tl.load(offsets + token) * cache_stride_slot
    i = tl.arange(0, WIDTH)
    inside = i < NUM_VALUES
    head, d = i // HEAD_DIM, i % HEAD_DIM
    k = tl.load(key + token * key_stride_token + head * key_stride_head + d, mask=inside)
    v = tl.load(value + token * value_stride_token + head * value_stride_head + d, mask=inside)
    if IS_FP8:  # the conversion of some GPUs turns what is too large into NaN
        k = k.to(tl.float32) * key_factor
        v = v.to(tl.float32) * value_factor
        k = tl.clamp(k, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
        v = tl.clamp(v, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    tl.store(cache + slot + i, k, mask=inside)
    tl.store(cache + slot + cache_stride_value + i, v, mask=inside)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write one layer's new keys and values into their slots, in place.

    T = tokens in this step, H = KV heads, D = head dim.

    Args:
        key: `[H, T, D]`, the last dimension contiguous.
        value: `[H, T, D]`, likewise.
        cache: `[num_blocks, 2, block_size, H, D]`, the last two dimensions contiguous. Mutated.
            Of the dtype of `key`, or float8_e4m3fn.
        blocks: `[T]` int64, contiguous.
        offsets: `[T]` int64, contiguous. Places must be distinct, unless they are never read.
        key_scale: in an 8-bit cache, `key / key_scale` is stored, saturated; of no effect in
            others.
        value_scale: likewise.

    Cost: each value read and written once, bound by bandwidth.
    Reference: `tests/kernels/test_store_kv.py`, bit-exact.
    """
    num_heads, num_tokens, head_dim = key.shape
    num_values = num_heads * head_dim
    _store_kv[(num_tokens,)](
        key,
        value,
        cache,
        blocks,
        offsets,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        1 / key_scale,
        1 / value_scale,
        NUM_VALUES=num_values,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(num_values),
        IS_FP8=cache.dtype == torch.float8_e4m3fn,
    )
