"""A norm over channels that ranks share computes what the model's own does, or is refused."""

import pytest
import torch
from tiny_models import make_model
from torch import nn

from hotset.errors import ModelError
from hotset.parallel.norms import NormOfAll, is_of_all, join_norm


class NormBeforeGate(nn.Module):
    """Of another order than Mamba-2's, and so of other numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon, self.group_size = 1e-6, width

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden * scale * nn.functional.silu(gate)


@pytest.mark.parametrize("family", ["bamba", "granitemoehybrid", "nemotron_h"])
def test_one_rank_of_one_computes_what_the_model_does(family: str) -> None:
    name = "n_groups" if family == "nemotron_h" else "mamba_n_groups"
    model = make_model(family, **{name: 1})
    norm = next(module for module in model.modules() if type(module).__name__.endswith("Gated"))
    hidden, gate = torch.randn(
        2, 1, 5, len(norm.weight), generator=torch.Generator().manual_seed(0)
    )
    assert is_of_all(norm, len(norm.weight)) and not is_of_all(norm, 2 * len(norm.weight))
    joined = join_norm(norm, len(norm.weight))
    torch.testing.assert_close(joined(hidden, gate), norm(hidden, gate))
    # Half of the channels, of which the other half has squares of 0.
    half = NormOfAll(norm, 2 * len(norm.weight))(hidden, gate)
    ratio = (half / joined(hidden, gate)).mean().item()
    assert ratio == pytest.approx(2**0.5, rel=1e-3)


def test_a_norm_of_another_order_is_refused() -> None:
    with pytest.raises(ModelError, match="NormBeforeGate is no gated norm as Mamba-2 has it"):
        join_norm(NormBeforeGate(16), 32)
