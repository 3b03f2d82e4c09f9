"""Attention with sinks out of attention without, in Triton's interpreter where there is no GPU."""

import math

import pytest
import torch

from hotset.kernels.leave_to_sinks import leave_to_sinks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_sinks_take_part_in_the_softmax_and_add_nothing(dim: int, in_place: bool) -> None:
    num_tokens, num_heads, num_keys = 5, 6, 9
    scores = 4 * torch.randn(num_tokens, num_heads, num_keys, device=DEVICE)
    values = torch.randn(num_heads, num_keys, dim, device=DEVICE)
    sinks = 3 * torch.randn(num_heads, device=DEVICE)
    output = torch.einsum("thk,hkd->thd", scores.softmax(-1), values).contiguous()
    sums = scores.logsumexp(-1) / math.log(2)
    column = sinks.view(1, -1, 1).expand(num_tokens, -1, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    expected = 0.5 * torch.einsum("thk,hkd->thd", weights, values)

    target = output if in_place else torch.full_like(output, torch.nan)
    leave_to_sinks(output, sums, sinks, target, scale=0.5)
    torch.testing.assert_close(target, expected)
