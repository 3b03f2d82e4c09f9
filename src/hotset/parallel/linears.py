"""Linear layers of which a rank has some columns or rows."""

from typing import Any

import torch
from torch import nn

from hotset.parallel.collectives import all_reduce, gather_columns
from hotset.parallel.cuts import Cut, Table
from hotset.parallel.parts import Part, share


@torch.no_grad()
def cut_module(module: Any, table: Table, path: str, rank: int) -> dict[str, Part]:
    """Leave a module with the part of one rank, in place; on `meta` too.

    A bias beside rows stays whole, for `Summed`.

    Args:
        module: whole; a linear layer, plain or 8-bit, or one whose own parameters are cut along
            their first dimension.
        table: that says how it is cut.
        path: of the module there.
        rank: whose part it becomes.

    Returns:
        By name of a parameter, which part of it is left.
    """
    if table.cuts[path] is Cut.ROWS:
        part = Part(1, (table.rows(module.in_features, rank),))
        parts = {"weight": part}
        module.in_features = part.length
    else:
        own = [weight for weight in module._parameters.values() if weight is not None]
        part = Part(0, table.columns(path, len(own[0]) if own else 0, rank))
        parts = {name: part for name, weight in module._parameters.items() if weight is not None}
        if hasattr(module, "out_features"):
            module.out_features = part.length
    for name, part in parts.items():
        whole = module._parameters[name]
        module._parameters[name] = nn.Parameter(part.of(whole).clone(), requires_grad=False)
    for name, layout in table.attributes.get(path, {}).items():
        setattr(module, name, Part(0, share(layout, rank, table.size)).length)
    for name, layout in table.buffers.get(path, {}).items():
        buffer = module._buffers[name]
        module._buffers[name] = Part(buffer.ndim - 1, share(layout, rank, table.size)).of(buffer)
    return parts


class Summed(nn.Module):
    """A layer of which each rank has some rows: their outputs add up to the whole's.

    Args:
        part: of this rank, whose bias is taken from it.
    """

    bias: nn.Parameter | None

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part
        self.register_parameter("bias", part.bias)
        part.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., a rank's rows]` to `[..., out]`."""
        out: torch.Tensor = all_reduce(self.part(x))
        return out if self.bias is None else out + self.bias


class Gathered(nn.Module):
    """The layer that makes logits, of which each rank has some columns: all ranks get all.

    Attributes:
        weight: `[0]`, for model code that asks for its dtype; whatever computes with it fails.
    """

    def __init__(self, part: Any, num_columns: int) -> None:
        super().__init__()
        self.part = part
        self._num_columns = num_columns
        self.register_buffer("weight", part.weight.new_empty(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., columns of all ranks]`."""
        out: torch.Tensor = gather_columns(self.part(x), self._num_columns)
        return out
