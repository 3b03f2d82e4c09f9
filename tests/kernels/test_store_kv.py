"""The paged write, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels.store_kv import store_kv  # noqa: E402
from hotset.linear.fp8 import FP8, to_fp8  # noqa: E402


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 64), (2, 16), (3, 24), (8, 128)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_written_where_they_belong_and_nowhere_else(
    num_heads: int, head_dim: int, transposed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_tokens, num_blocks, num_layers, size = 7, 5, 3, 4
    row = num_layers * 2 * size * num_heads * head_dim
    storage = torch.randn(num_blocks, row, device=DEVICE).to(dtype)
    expected = storage.clone()
    shape = (num_blocks, 2, size, num_heads, head_dim)
    layer = slice(row // num_layers, 2 * row // num_layers)  # a strided view of the pool
    blocks = torch.tensor([4, 0, 0, 2, 4, 1, 3], device=DEVICE)
    offsets = torch.tensor([3, 0, 2, 1, 0, 3, 3], device=DEVICE)
    key, value = torch.randn(2, num_tokens, num_heads, head_dim, device=DEVICE).to(dtype)
    key, value = key.transpose(0, 1), value.transpose(0, 1)  # [H, T, D]
    if transposed:
        key, value = key.contiguous(), value.contiguous()

    store_kv(key, value, storage[:, layer].view(shape), blocks, offsets)

    cache = expected[:, layer].view(shape)
    cache[:, 0][blocks, offsets] = key.transpose(0, 1)
    cache[:, 1][blocks, offsets] = value.transpose(0, 1)
    assert torch.equal(storage, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.037 if DEVICE == "cuda" else 4.0])
def test_8_bit_floats_are_those_of_the_reference_saturated(
    dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(0)
    key, value = (torch.randn(2, 2, 40, 24, device=DEVICE) * 3).to(dtype)
    key[0, :4, 0] = torch.tensor([5000.0, -6e4, 0.0, 1e-4])
    if DEVICE == "cpu":  # Triton's interpreter does not round, and knows no NaN among these
        key, value = (
            torch.where(x.abs() < 1, 0, to_fp8(x, 1.0).float()).to(dtype) for x in (key, value)
        )
        key[0, :2, 0] = torch.tensor([5000.0, -6e4], dtype=dtype)
    else:
        value[1, 0, 5] = torch.nan
    cache = torch.zeros(10, 2, 4, 2, 24, dtype=FP8, device=DEVICE)
    places = torch.randperm(40, device=DEVICE)
    blocks, offsets = places // 4, places % 4

    store_kv(key, value, cache, blocks, offsets, key_scale=scale, value_scale=2 * scale)

    written = cache.view(torch.uint8)
    expected_key = to_fp8(key, scale).view(torch.uint8).transpose(0, 1)
    expected_value = to_fp8(value, 2 * scale).view(torch.uint8).transpose(0, 1)
    assert torch.equal(written[:, 0][blocks, offsets], expected_key)
    assert torch.equal(written[:, 1][blocks, offsets], expected_value)
    assert cache.float()[blocks[:2], 0, offsets[:2], 0, 0].tolist() == [448, -448]
    assert cache.float().isnan().sum() == (DEVICE == "cuda")
