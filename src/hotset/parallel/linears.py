"""Linear layers of which a rank has some columns or rows."""

import torch
from torch import nn

from hotset.parallel.collectives import all_reduce, gather_columns
from hotset.parallel.cuts import Cut, Index, Table

_ALL = slice(None)


@torch.no_grad()
def cut_linear(layer: nn.Module, table: Table, path: str, rank: int) -> dict[str, Index]:
    """Leave a layer with the part of one rank, in place; on `meta` too.

    A bias beside rows is rank 0's alone, as the outputs are summed.

    Args:
        layer: plain or 8-bit, whole.
        table: that says how it is cut.
        path: of the layer there.
        rank: whose part it becomes.

    Returns:
        By name of a parameter, which part of it is left.
    """
    assert isinstance(layer.out_features, int) and isinstance(layer.in_features, int)
    if table.cuts[path] is Cut.ROWS:
        rows = table.rows(layer.in_features, rank)
        parts: dict[str, Index] = {"weight": (_ALL, rows)}
        layer.in_features = rows.stop - rows.start
        if rank:
            layer.register_parameter("bias", None)
    else:
        columns = table.columns(path, layer.out_features, rank)
        parts = dict.fromkeys(layer._parameters, (columns,))
        layer.out_features = columns.stop - columns.start
    for name, part in parts.items():
        whole = layer._parameters[name]
        if whole is not None:
            layer._parameters[name] = nn.Parameter(whole[part].clone(), requires_grad=False)
    return parts


class Summed(nn.Module):
    """A layer of which each rank has some rows: their outputs add up to the whole's."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., a rank's rows]` to `[..., out]`."""
        out: torch.Tensor = all_reduce(self.part(x))
        return out


class Gathered(nn.Module):
    """The layer that makes logits, of which each rank has some columns: all ranks get all."""

    def __init__(self, part: nn.Module, num_columns: int) -> None:
        super().__init__()
        self.part = part
        self._num_columns = num_columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., columns of all ranks]`."""
        out: torch.Tensor = gather_columns(self.part(x), self._num_columns)
        return out
