"""The write of latents, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels.store_latent import store_latent  # noqa: E402


@pytest.mark.parametrize(("rank", "rope_dim"), [(512, 64), (16, 8), (13, 3)])
@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize("layers_beside", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_where_they_belong_and_nowhere_else(
    rank: int, rope_dim: int, is_view: bool, layers_beside: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_blocks, size, width = 5, 4, rank + rope_dim
    storage = torch.randn(num_blocks, 2 * size * layers_beside * width, device=DEVICE).to(dtype)
    expected = storage.clone()
    blocks = torch.tensor([4, 0, 0, 2, 4, 1, 3], device=DEVICE)
    offsets = torch.tensor([3, 0, 2, 1, 0, 3, 3], device=DEVICE)
    both = torch.randn(7, width, device=DEVICE).to(dtype)
    latent, rotary = both.split([rank, rope_dim], dim=1)
    if not is_view:
        latent, rotary = latent.contiguous(), rotary.contiguous()

    def layer(memory: torch.Tensor) -> torch.Tensor:
        """The last of some layers whose rows are side by side, in the second half of a block."""
        half = memory[:, memory.shape[1] // 2 :]
        return half.view(num_blocks, size, layers_beside, width)[:, :, -1]

    store_latent(latent, rotary, layer(storage), blocks, offsets)

    layer(expected)[blocks, offsets] = both
    assert torch.equal(storage, expected)
