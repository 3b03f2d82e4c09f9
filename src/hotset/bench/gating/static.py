"""Static gating, the baseline that dynamic gating is measured against, and the paper's experts.

Static is what GShard and fairseq do: every expert gets C = ceil(f * S) rows of a batch of S tokens,
a dispatch mask `[S, E, C]` puts tokens there, experts compute all C rows, empty or not, and a token
that finds its expert full is dropped. Dynamic is `hotset.experts.gating`, as the engine runs it.

Of E * C rows static computes, k * S are asked for: E * f / k is the waste a ratio comes from.
Source: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from hotset.bench.gating.work import capacity_of
from hotset.errors import ConfigError
from hotset.experts.weights import IMPLEMENTATION


@dataclass(frozen=True)
class Shape:
    """One MoE layer: experts of two matrices with ReLU between, as in the paper.

    Attributes:
        num_experts: E.
        hidden: d.
        ffn: rows of an expert's first matrix.
        top_k: experts of a token.
    """

    num_experts: int
    hidden: int
    ffn: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.num_experts, self.hidden, self.ffn, self.top_k) < 1:
            raise ConfigError(f"every size of an MoE layer must be 1 or more: {self}")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top-{self.top_k} of {self.num_experts} experts is not possible")


class ExpertsConfig:
    """What transformers' experts interface reads of a config."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._experts_implementation = IMPLEMENTATION


@use_experts_implementation(has_gate=False)
class PaperExperts(nn.Module):
    """`[E, ffn, d]` and `[E, d, ffn]` weights with ReLU between, of transformers' interface."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        shape = config.shape
        self.num_experts = shape.num_experts
        self.act_fn = nn.ReLU()
        for name, rows, columns in (
            ("up_proj", shape.ffn, shape.hidden),
            ("down_proj", shape.hidden, shape.ffn),
        ):
            weight = torch.empty(shape.num_experts, rows, columns).normal_(0, columns**-0.5)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))


Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_on(
    device: torch.device | str, dtype: torch.dtype, seed: int, make: Callable[[], nn.Module]
) -> nn.Module:
    """What `make` makes, with its tensors on `device` in `dtype`, from `seed`."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(default)


def make_layer(
    shape: Shape, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """Experts with random weights, made on `device`; the next call gives equal ones."""
    return make_on(device, dtype, seed, lambda: PaperExperts(ExpertsConfig(shape)))


def route(
    hidden_states: torch.Tensor, router: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, k]` expert ids and weights that sum to 1 of `[S, d]` tokens, by a `[E, d]` router."""
    scores = (hidden_states @ router.T).float().softmax(-1)
    weights, ids = scores.topk(top_k, dim=-1)
    return ids, (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype)


def dispatch_mask(ids: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    """`[k, S, E, C]` booleans: choice k of a token is row C of expert E.

    First choices of all tokens go before second ones, and earlier tokens before later, as in
    GShard (algorithm 1); what does not fit is nowhere.
    """
    chosen = nn.functional.one_hot(ids.T, num_experts)  # [k, S, E]
    flat = chosen.reshape(-1, num_experts)
    row = ((flat.cumsum(0) - 1) * flat).sum(-1).view(ids.shape[1], -1)  # [k, S]
    rows = torch.arange(capacity, device=ids.device)
    return chosen.bool().unsqueeze(-1) & (row[..., None, None] == rows)


def static_experts(
    layer: Any,
    hidden_states: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    factor: float,
) -> torch.Tensor:
    """`[S, d]` by static gating; arguments as for `dynamic_experts`."""
    num_tokens, top_k = ids.shape
    capacity = capacity_of(factor, num_tokens)
    dtype = hidden_states.dtype
    mask = dispatch_mask(ids, layer.num_experts, capacity)
    combine = mask[0].to(dtype) * weights[:, 0, None, None]  # [S, E, C]
    for choice in range(1, top_k):
        combine += mask[choice].to(dtype) * weights[:, choice, None, None]
    dispatch = mask.any(0).to(dtype)
    del mask
    rows = torch.einsum("sec,sd->ecd", dispatch, hidden_states)
    rows = layer.act_fn(torch.bmm(rows, layer.up_proj.transpose(1, 2)))
    rows = torch.bmm(rows, layer.down_proj.transpose(1, 2))
    return torch.einsum("sec,ecd->sd", combine, rows)


def dropped_share(ids: torch.Tensor, num_experts: int, factor: float) -> float:
    """Share of routed rows beyond the capacity of their expert."""
    counts = torch.bincount(ids.reshape(-1), minlength=num_experts)
    over = (counts - capacity_of(factor, len(ids))).clamp(min=0).sum()
    return float(over) / ids.numel()
