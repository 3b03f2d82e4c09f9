"""Tokens chosen for requests, as the engine has them chosen."""

from collections.abc import Sequence

import torch

from hotset.engine.step_input import make_sample_input
from hotset.executor.sampler import Sampled, Sampler
from hotset.sequence import Request


def sample(sampler: Sampler, logits: torch.Tensor, requests: Sequence[Request]) -> Sampled:
    """The next token of each request, by its row of `logits`."""
    return sampler.submit(logits, make_sample_input(requests)).wait()
