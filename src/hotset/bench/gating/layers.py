"""Weights of the layers that are compared, ways to compute them, and the least memory of each."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from hotset.bench.gating.static import Shape
from hotset.bench.gating.sweep import Way
from hotset.bench.gating.work import capacity_of
from hotset.errors import ConfigError
from hotset.experts.gating import dynamic_experts, pack_experts
from hotset.experts.weights import ATTRIBUTE

M = TypeVar("M", bound=nn.Module)


def packed_twin(layer: nn.Module) -> nn.Module:
    """The layer as the engine has it: on the CPU a packed one beside the plain one."""
    first = next(layer.parameters())
    if first.device.type != "cpu" or first.dtype != torch.float32:
        return layer
    twin: nn.Module = object.__new__(type(layer))
    twin.__dict__ = {name: value for name, value in layer.__dict__.items() if name != ATTRIBUTE}
    twin._parameters = dict(layer._parameters)
    twin._modules = dict(layer._modules)
    pack_experts(twin)
    return twin


def engine_ways(plain: nn.Module, shape: Shape, dtype: torch.dtype, *, matrices: int) -> list[Way]:
    """Dynamic gating and both of transformers' own, of a layer with `matrices` per expert."""

    def least(*, gathers: bool = False) -> Callable[[int], int]:
        return lambda tokens: least_bytes(
            shape, None, tokens, dtype.itemsize, gathers=gathers, matrices=matrices
        )

    return [
        Way("dynamic", partial(dynamic_experts, packed_twin(plain)), least_bytes=least()),
        Way("grouped_mm", partial(grouped_mm_experts_forward, plain), least_bytes=least()),
        Way(
            "batched_mm",
            partial(batched_mm_experts_forward, plain),
            least_bytes=least(gathers=True),
        ),
    ]


def make_weights(make: Callable[[], M]) -> M:
    """What `make` makes.

    Raises:
        ConfigError: its weights do not fit into the device.
    """
    try:
        return make()
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the weights do not fit into the device; take fewer experts, or 0 layers"
        ) from None


def least_bytes(
    shape: Shape,
    factor: float | None,
    tokens: int,
    itemsize: int,
    *,
    gathers: bool = False,
    matrices: int = 2,
) -> int:
    """What a way cannot do without; `gathers` the matrices of an expert for each row."""
    if factor is not None:
        rows = shape.num_experts * capacity_of(factor, tokens)
        return rows * (
            tokens * (shape.top_k + 2 * itemsize) + (shape.hidden + shape.ffn) * itemsize
        )
    per_row = shape.hidden + shape.ffn
    if gathers:
        per_row += (matrices - 1) * shape.hidden * shape.ffn
    return tokens * shape.top_k * per_row * itemsize
