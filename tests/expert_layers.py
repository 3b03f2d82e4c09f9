"""Layers of random experts, resident and buffered, and steps that compare the two."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engines import make_slots
from tiny_models import HAS_POST_EXPERT_NORM
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from hotset.experts import hosting
from hotset.experts import layer as expert_layer
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.gating import dynamic_experts, pack_experts
from hotset.experts.hosting import move_to_host
from hotset.experts.narrow import NarrowDType, rounded_layout
from hotset.experts.prefetch import Router
from hotset.experts.sizes import narrow_layout
from hotset.experts.weights import IMPLEMENTATION, experts_of
from hotset.memory.region import SharedRegion
from hotset.options import Options


@dataclass(frozen=True)
class Sizes:
    """Of the experts of a layer; `std` of its random weights."""

    num_experts: int
    hidden: int
    middle: int
    std: float


SMALL = Sizes(6, 16, 24, 0.3)
NUM_EXPERTS, HIDDEN = SMALL.num_experts, SMALL.hidden
KINDS = [
    {"transposed": transposed, "bias": bias, "gate": gate}
    for transposed in (False, True)
    for bias in (False, True)
    for gate in (False, True)
]
if HAS_POST_EXPERT_NORM:
    KINDS.append({"transposed": False, "bias": False, "gate": True, "norm": True})
# With these the number of slots may change between two steps.
MOVABLE: list[dict[str, Any]] = [
    {"expert_plan": "cache"},
    {"expert_plan": "auto"},
    {"expert_plan": "auto", "expert_cold_dtype": "int4"},
    {"expert_plan": "cache", "expert_prefetch": 1},
]
PLAIN = {"transposed": False, "bias": False, "gate": True}


class Config:
    """What the decorated layer below asks of a model's config."""

    _experts_implementation = "eager"


def make_layer(
    *, transposed: bool, bias: bool, gate: bool, norm: bool = False, sizes: Sizes = SMALL
) -> nn.Module:
    """Experts of transformers' interface with random weights, of the kind that is asked for."""
    more = {"has_post_expert_norm": True} if norm else {}

    @use_experts_implementation(is_transposed=transposed, has_bias=bias, has_gate=gate, **more)
    class Layer(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.num_experts = sizes.num_experts
            self.act_fn = nn.SiLU()
            self.post_expert_norm = nn.RMSNorm(sizes.hidden)
            self.add("gate_up_proj" if gate else "up_proj", sizes.hidden, sizes.middle * (1 + gate))
            self.add("down_proj", sizes.middle, sizes.hidden)

        def add(self, name: str, size_in: int, size_out: int) -> None:
            shape = (size_in, size_out) if transposed else (size_out, size_in)
            weight = sizes.std * torch.randn(sizes.num_experts, *shape)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            added = torch.randn(sizes.num_experts, size_out)
            self.register_parameter(f"{name}_bias", nn.Parameter(added, requires_grad=False))

    return Layer(Config())


def make_layers(count: int, *, sizes: Sizes = SMALL, **kind: bool) -> list[nn.Module]:
    """Layers that dynamic gating computes, all different."""
    torch.manual_seed(0)
    layers = [make_layer(sizes=sizes, **kind) for _ in range(count)]
    for layer in layers:
        layer.config._experts_implementation = IMPLEMENTATION
    return layers


def buffered(
    layers: list[nn.Module],
    routers: list[Router] | None = None,
    region: SharedRegion | None = None,
    *,
    device: str = "cpu",
    **options: Any,
) -> tuple[list[nn.Module], ExpertBuffer]:
    """A copy of the layers, their experts in host memory, with slots on the device."""
    layers = copy.deepcopy(layers)
    config, target = Options.of(**options), torch.device(device)
    experts = [experts_of(layer) for layer in layers]
    for each in experts:
        move_to_host(each, narrow_layout(each, config.experts.expert_cold_dtype), target)
    return layers, make_slots(experts, config, target, routers, region)


def rounded(layers: list[nn.Module], cold: NarrowDType) -> list[nn.Module]:
    """A copy of the layers with the values that their experts have after rounding."""
    layers = copy.deepcopy(layers)
    for layer in layers:
        up = getattr(layer, experts_of(layer).up_name)
        narrow = rounded_layout(tuple(up.shape[1:]), tuple(layer.down_proj.shape[1:]), cold)
        values = narrow.dequantise(narrow.quantise(up, layer.down_proj), up.dtype)
        for weight, value in zip((up, layer.down_proj), values, strict=True):
            weight.copy_(value)
    return layers


def packed(layers: list[nn.Module]) -> list[nn.Module]:
    """A copy of the layers whose experts are packed."""
    layers = copy.deepcopy(layers)
    for layer in layers:
        pack_experts(layer)
    return layers


def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU compute as a GPU does: the products of PyTorch's grouped_mm run there too."""
    monkeypatch.setattr(expert_layer, "has_grouped_kernel", lambda weight: True)
    monkeypatch.setattr(hosting, "can_pack", lambda: False)


def routed(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[T, H]` hidden states, `[T, 2]` ids and `[T, 2]` weights."""
    weights, ids = torch.randn(num_tokens, NUM_EXPERTS).softmax(-1).topk(2)
    return torch.randn(num_tokens, HIDDEN), ids, weights


def guess(hidden: torch.Tensor) -> torch.Tensor:
    """A router."""
    return hidden[:, :NUM_EXPERTS].topk(2).indices


def computed(
    layers: list[nn.Module],
    expected: list[nn.Module],
    num_tokens: int,
    *,
    with_others: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer computes of random rows, and what it should; its table is consistent.

    One id is of no expert here `with_others`.
    """
    for layer, other in zip(layers, expected, strict=True):
        x, ids, weights = routed(num_tokens)
        if with_others:
            ids[-1, 0] = NUM_EXPERTS
        yield dynamic_experts(layer, x, ids, weights), dynamic_experts(other, x, ids, weights)
        experts_of(layer).buffer.table.check()
