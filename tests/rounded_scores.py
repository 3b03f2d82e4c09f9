"""Index keys of 8 bits in a model of transformers, whose indexers keep them as they are."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hotset.attention.sparse.indexer import indexers


def hadamard(width: int) -> torch.Tensor:
    """`[width, width]` float64, 1 and -1, by its definition."""
    rows = [[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    return torch.tensor(rows, dtype=torch.float64)


def rounded(keys: torch.Tensor) -> torch.Tensor:
    """`[..., D]` float32 keys as they are after 8 bits, each with its power of two."""
    largest = keys.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(largest.double() / 448)))
    return (keys.double() / scale).float().to(torch.float8_e4m3fn).double() * scale


class _RoundedKeys(TorchFunctionMode):
    """The first product of an indexer is that of its queries and keys."""

    is_first = True

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul and self.is_first:
            self.is_first = False
            query, keys = args  # [B, S, H, D] and [B, 1, D, N]
            turn = hadamard(query.shape[-1])
            own = rounded((keys.double().transpose(-1, -2) @ turn).float())
            turned = (query.double() @ turn / len(turn)).float()
            return func(turned, own.float().transpose(-1, -2))
        return func(*args, **(kwargs or {}))


def _forward(of: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        del self
        with _RoundedKeys() as mode:
            found = of(*args, **kwargs)
        assert not mode.is_first
        return found

    return forward


def round_index_keys(model: PreTrainedModel) -> None:
    """Have the indexers of a model of transformers score keys of 8 bits."""
    for indexer in indexers(model):
        indexer.forward = types.MethodType(_forward(indexer.forward), indexer)
