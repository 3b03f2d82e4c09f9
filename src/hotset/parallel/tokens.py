"""Tokens of all lanes brought to the experts that they share, and sums given back.

With data-parallel attention each rank has tokens of its own, and a part of the experts. All ranks
compute the tokens of all, as many of each: each operation is one of fixed shapes, which compilers
do not look into. See `collectives` for the sums of ranks that have the same tokens.
"""

import torch
from torch import distributed
from torch.nn import functional

from hotset.parallel.collectives import all_gather_pieces
from hotset.parallel.group import current

# PyTorch 2.13 has another name for it, and warns of the older one.
_reduce_scatter = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)


@torch.library.custom_op("hotset::gather_tokens", mutates_args=())
def gather_tokens(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What routers have chosen, of all ranks one after another, by one collective.

    T = tokens of a rank, the same on all; N = ranks; K = experts of a token.

    Args:
        hidden: `[T, H]`.
        ids: `[T, K]` of experts.
        weights: `[T, K]` of these.

    Returns:
        `[N * T, H]`, `[N * T, K]` and `[N * T, K]`, of the same dtypes.
    """
    parts = hidden, ids, weights
    # Bytes of a token side by side, those of the widest numbers first.
    order = sorted(range(3), key=lambda number: -parts[number].itemsize)
    as_bytes = [parts[number].contiguous().view(torch.uint8) for number in order]
    rows = torch.cat(as_bytes, dim=1)
    group = current()
    if group.is_alone:
        gathered = rows.repeat(group.size, 1)
    else:
        gathered = rows.new_empty(group.size * len(rows), rows.shape[1])
        all_gather_pieces(gathered, rows)
    pieces = gathered.split([part.shape[1] for part in as_bytes], dim=1)
    found = {
        number: piece.contiguous().view(parts[number].dtype)
        for number, piece in zip(order, pieces, strict=True)
    }
    return found[0], found[1], found[2]


@gather_tokens.register_fake
def _(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = current().size
    gathered = [
        part.new_empty(size * part.shape[0], part.shape[1]) for part in (hidden, ids, weights)
    ]
    return gathered[0], gathered[1], gathered[2]


@torch.library.custom_op("hotset::scatter_sums", mutates_args=())
def scatter_sums(x: torch.Tensor) -> torch.Tensor:
    """Of `[N * T, H]` on each rank the sum over all ranks, of this rank's T tokens: `[T, H]`."""
    group, x = current(), x.contiguous()
    own = x.new_empty(len(x) // group.size, x.shape[1])
    if group.is_alone:
        return own.copy_(x[group.rank * len(own) : (group.rank + 1) * len(own)])
    _reduce_scatter(own, x)
    return own


@scatter_sums.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0] // current().size, x.shape[1])


def collect_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor | None:
    """Bring `[R, V]` of each rank to rank 0, which gets `[N, num_rows, V]`; the others get None.

    R is at most `num_rows`; what rows beyond it hold is not said.
    """
    group = current()
    padded = functional.pad(rows, (0, 0, 0, num_rows - len(rows)))
    if group.rank:
        distributed.gather(padded, None, 0)
        return None
    found = padded.new_empty(group.size, *padded.shape)
    distributed.gather(padded, list(found.unbind()), 0)
    return found
