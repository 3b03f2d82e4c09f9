"""Weights of the layers that are compared, and the least memory that each way needs."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from hotset.bench.gating.static import Shape, capacity_of
from hotset.errors import ConfigError
from hotset.experts.gating import pack_experts
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


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
