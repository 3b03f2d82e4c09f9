"""Which linear layers may be replaced: those whose weight the model's own code does not read.

A layer that is only called can be packed, merged or rounded. Some model code reads `layer.weight`
itself, for its dtype or for a product of its own; such a layer has to stay as it is.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional

_read: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers
_noted: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models


@contextlib.contextmanager
def noting_reads(model: nn.Module) -> Iterator[None]:
    """While it lasts, run the model once: layers whose weight or bias it reads are marked.

    Does nothing for a model that has been marked: code compiled for its layers stays good.
    """
    if model in _noted:
        yield
        return
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = _Watched
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
    _noted.add(model)


def is_replaceable(layer: object) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear layer that the model, when it ran, did no more than call."""
    # The exact class: a subclass may compute something else.
    return type(layer) is nn.Linear and not is_read(layer)


def is_read(layer: nn.Module) -> bool:
    """Whether the model was seen to read its weight or bias."""
    return layer in _read


def mark_as_read(layer: nn.Module) -> None:
    """Note that the model reads its weight or bias, as another model of its kind does."""
    _read.add(layer)


class _Watched(nn.Linear):
    """A linear layer that notes who reads its parameters; parameters are found by `__getattr__`."""

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_parameters"]:
            mark_as_read(self)
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters
        weight = parameters["weight"]
        assert weight is not None
        return functional.linear(x, weight, parameters["bias"])
