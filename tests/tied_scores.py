"""Which of equal scores an indexer of transformers selects: any by its own code, here the lowest.

A score is exactly 0 where no head's product is positive, so ties are common where heads are few.
Its code calls `topk`, which promises no order among equal values: what it selects of them depends
on how long a row is with its masked end, so on how a text is cut into steps.
"""

import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hotset.attention.sparse.indexer import indexers


class _LowestOfTies(TorchFunctionMode):
    """`topk` of the same values, of equal ones those at the lowest places."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return found
        ranked = args[0].sort(dim=-1, descending=True, stable=True)
        values, places = (each[..., : args[1]] for each in ranked)
        assert torch.equal(values, found.values)  # nothing but ties is decided here
        return torch.return_types.topk((values, places))


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _LowestOfTies():
        return type(self).forward(self, *args, **kwargs)


def select_lowest_of_ties(model: PreTrainedModel) -> None:
    """Have the indexers of a model of transformers break ties as those of an engine do."""
    for indexer in indexers(model):
        indexer.forward = types.MethodType(_forward, indexer)
