"""Tokens drawn by a kernel, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from sampling import sample

from hotset.executor.sampler import Sampler, _invert
from hotset.kernels.draw_tokens import draw_tokens
from hotset.request import SamplingParams
from hotset.sequence import Request

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(
    logits: torch.Tensor, temperatures: torch.Tensor, shares: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    token_ids = torch.full((len(logits),), -1, device=DEVICE)
    draw_tokens(logits, logits.amax(-1), rows, temperatures, shares, token_ids)
    return token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 300, 5000])
def test_a_token_is_that_of_the_cumulative_distribution(
    vocab_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(vocab_size)
    logits = (3 * torch.randn(40, vocab_size, device=DEVICE)).to(dtype)
    logits[:, torch.rand(vocab_size, device=DEVICE) < 0.5] = -torch.inf
    logits[:, vocab_size // 2] = 1.0
    rows = torch.randperm(40, device=DEVICE)[:30]
    temperatures = 0.1 + 2 * torch.rand(30, device=DEVICE)
    shares = torch.rand(30, dtype=torch.float64, device=DEVICE)
    shares[0], shares[1] = 0.0, 1 - 2**-53
    found = draw(logits, temperatures, shares, rows)

    scaled = logits[rows].float()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperatures[:, None]
    expected = _invert(scaled.exp(), shares[:, None])
    assert torch.equal(found[rows][2:], expected[2:])
    assert (scaled.gather(1, found[rows][:, None]) > -torch.inf).all()
    likely = scaled > -20
    assert found[rows[0]] == (scaled[0] > -80).nonzero()[0]
    assert found[rows[1]] >= likely[1].nonzero()[-1]
    others = torch.ones(40, dtype=torch.bool, device=DEVICE)
    others[rows] = False
    assert (found[others] == -1).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_of_logits_that_mean_nothing_a_token_is_drawn_all_the_same(value: float) -> None:
    logits = torch.full((2, 300), value, device=DEVICE)
    one = torch.ones(2, device=DEVICE)
    found = draw(logits, one, one.double() / 2, torch.arange(2, device=DEVICE))
    assert ((found >= 0) & (found < 300)).all()


def test_a_sampler_draws_the_same_with_and_without_the_kernel() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 300, device=DEVICE)
    params = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, seed=2, top_p=0.9),
        SamplingParams(temperature=1.3, seed=3),
        SamplingParams(temperature=1.0, seed=4, logprobs=2),
        SamplingParams(temperature=2.0, seed=5, top_k=7),
    ]
    requests = [Request(str(i), 2, [1, 2], p, 10) for i, p in enumerate(params)]
    tokens = []
    for has_kernel in (False, True):
        sampler = Sampler(300, DEVICE)
        sampler._has_kernel = has_kernel
        tokens.append([sample(sampler, logits, requests).token_ids for _ in range(20)])
    assert tokens[0] == tokens[1]
