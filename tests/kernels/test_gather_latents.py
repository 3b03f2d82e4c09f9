"""The gather of a piece of a context, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels.gather_latents import gather_latents  # noqa: E402


@pytest.mark.parametrize(
    ("rank", "rope_dim", "num_heads"), [(512, 64, 4), (16, 8, 3), (13, 3, 1), (512, 64, 20)]
)
@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 11), (3, 6), (5, 2), (9, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_come_once_and_rotary_keys_to_each_head(
    rank: int, rope_dim: int, num_heads: int, first: int, count: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    width, size = rank + rope_dim, 4
    # The second of two layers, whose rows are side by side.
    cache = torch.randn(5, size, 2, width, device=DEVICE).to(dtype)[:, :, 1]
    table = torch.tensor([4, 1, 2], dtype=torch.int32, device=DEVICE)
    context = cache[table.long()].flatten(0, 1)[first : first + count]
    latents = torch.zeros(count, rank, dtype=dtype, device=DEVICE)
    made = torch.randn(count + 1, num_heads, rope_dim + 5, device=DEVICE).to(dtype)
    before = made.clone()

    gather_latents(cache, table, first, latents, made[:count])

    assert torch.equal(latents, context[:, :rank])
    expected = context[:, None, rank:].expand(-1, num_heads, -1)
    assert torch.equal(made[:count, :, :rope_dim], expected)
    assert torch.equal(made[:, :, rope_dim:], before[:, :, rope_dim:])
    assert torch.equal(made[count], before[count])
