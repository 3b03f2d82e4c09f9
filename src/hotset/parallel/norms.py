"""A gated norm over channels of which each rank has some."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hotset.errors import ModelError
from hotset.parallel.collectives import all_reduce
from hotset.parallel.group import alone

_CHECKED_ROWS = 3


class NormOfAll(nn.Module):
    """What Mamba-2's gated norm computes over one group, which several ranks share.

    `weight * h / rms(h)` of `h = x * silu(gate)`, in float32: each rank adds its squares to those
    of all others, one number per token.

    Source: `MambaRMSNormGated` of transformers.

    Args:
        part: transformers' norm, with the weights of this rank's channels.
        num_channels: of all ranks.
    """

    def __init__(self, part: Any, num_channels: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = part.weight
        self._epsilon, self._num_channels = float(part.variance_epsilon), num_channels

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """`[..., a rank's channels]` of both, to the same."""
        values = hidden.float() * functional.silu(gate.float())
        squares = all_reduce(values.square().sum(-1, keepdim=True))
        values = values * torch.rsqrt(squares / self._num_channels + self._epsilon)
        return self.weight * values.to(hidden.dtype)


def is_of_all(norm: Any, num_channels: int) -> bool:
    """Whether a norm is a gated one over all of `num_channels`, by its attributes."""
    return (
        hasattr(norm, "variance_epsilon")
        and not hasattr(norm, "norm_before_gate")
        and norm.weight.shape == (num_channels,)
        and getattr(norm, "group_size", num_channels) == num_channels
    )


def join_norm(part: Any, num_channels: int) -> NormOfAll:
    """`NormOfAll` of a norm that was cut; on `meta` too.

    Raises:
        ModelError: the model's own code computes otherwise.
    """
    width = len(part.weight)
    if hasattr(part, "group_size"):
        part.group_size = width
    if not part.weight.is_meta:
        numbers = torch.arange(2 * _CHECKED_ROWS * width, dtype=torch.float32).sin()
        hidden, gate = numbers.view(2, 1, _CHECKED_ROWS, width).to(part.weight)
        with alone(), torch.inference_mode():
            ours, theirs = NormOfAll(part, width)(hidden, gate), part(hidden, gate)
        bound = torch.finfo(theirs.dtype).eps ** 0.5
        if not torch.allclose(ours, theirs, rtol=bound, atol=bound):
            raise ModelError(
                f"{type(part).__name__} is no gated norm as Mamba-2 has it, so that several GPUs "
                "cannot share its channels; use one GPU"
            )
    return NormOfAll(part, num_channels)
