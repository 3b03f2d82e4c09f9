"""The paged write, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels.store_kv import store_kv  # noqa: E402


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
