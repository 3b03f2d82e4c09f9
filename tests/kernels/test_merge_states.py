"""Joining attention over parts, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels.merge_states import merge_states  # noqa: E402


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """Output, and base-2 logarithms of sums, of `[T, H, D]` queries over `[S, H, D]`."""
    scores = torch.einsum("thd,shd->ths", query, keys)
    output = torch.einsum("ths,shv->thv", scores.softmax(-1), values)
    return [output, scores.logsumexp(-1) / torch.log(torch.tensor(2.0))]


@pytest.mark.parametrize("value_dim", [128, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_parts_is_that_over_all(value_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(11, 3, 16, device=DEVICE), torch.randn(40, 3, 16, device=DEVICE) * 3
    values = torch.randn(40, 3, value_dim, device=DEVICE)
    output, sums = attend(query, keys[:9], values[:9])
    output = output.to(dtype).contiguous()
    for part in (slice(9, 10), slice(10, 33), slice(33, 40)):
        other, other_sums = attend(query, keys[part], values[part])
        merge_states(output, sums, other.to(dtype).contiguous(), other_sums.contiguous())
    expected, expected_sums = attend(query, keys, values)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.float(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(sums, expected_sums)
