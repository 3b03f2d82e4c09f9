"""Rows of hot requests: what their kernels take, and the same in PyTorch, which a CPU runs."""

from enum import IntEnum
from typing import NamedTuple

import torch


class LayerSeats(NamedTuple):
    """What the device knows of the hot requests, for the layers that share one selection.

    B = seats, S = slots of a seat, N = positions of the longest context, both multiples of the
    block size. All are contiguous and on the device.

    Attributes:
        host: `[B, N / block size]` int32, the host slot of each of a request's blocks; -1 where it
            has no copy there.
        slot_blocks: `[B, S / block size]` int32, device blocks: slot s is row `s % block size` of
            the block at `s // block size`.
        token_in: `[B, S]` int32, the position that each slot holds; -1 for none.
        order: `[B, S]` int16, slots from the longest unused to the last used. Mutated with
            `token_in`.
        rank_of: `[B, N]` int16, scratch, -1 in between.
        spare: `[B, S]` int16, scratch.
        ahead: `[B, 2]` int32, of the slots that a guess filled the first place in `order` and the
            one after the last; equal for none. The next selection ends it. Mutated.
        totals: `[B, 5]` int64, see `Total`. Added to.
    """

    host: torch.Tensor
    slot_blocks: torch.Tensor
    token_in: torch.Tensor
    order: torch.Tensor
    rank_of: torch.Tensor
    spare: torch.Tensor
    ahead: torch.Tensor
    totals: torch.Tensor


class Total(IntEnum):
    """What is counted of the tokens of a seat."""

    HIT = 0
    """Selected, and a slot held it."""
    MISSED = 1
    """Selected, and no slot held it."""
    LOST = 2
    """Had to come and has no copy in host memory, which is a bug."""
    GUESSED = 3
    """Guessed, and no slot held it: it came ahead of the selection."""
    GUESSED_RIGHT = 4
    """Of these, selected next: one of the hits."""


class Misses(NamedTuple):
    """Rows that must come from host memory, as `kernels/gather_rows` takes them.

    T = tokens of the step, K = selected tokens.

    Attributes:
        places: `[T, K]` int32, of a row in host memory its slot times the block size, plus its
            offset.
        rows: `[T, K]` int32, the device rows that they go to.
        counts: `[T]` int32, how many are listed; what follows means nothing.
    """

    places: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor


class RowRun(NamedTuple):
    """Where rows that come together are in a block on the device, and in a slot of host memory.

    They are those of a token in neighbouring layers, which lie side by side.

    Attributes:
        start_bytes: where the first of these layers has the row of a block's first token.
        row_bytes: of a row in one layer.
        num_layers: whose rows come.
        block_size: tokens of a block. The token at offset i of host slot s is number
            `s * block_size + i`.
        rows_per_block: on the device rows of all layers are numbered as one: the token at offset i
            of block b is number `b * rows_per_block + i * rows_per_token`.
        rows_per_token: layers whose rows of a token lie side by side; all of `num_layers` do.
    """

    start_bytes: int
    row_bytes: int
    num_layers: int
    block_size: int
    rows_per_block: int
    rows_per_token: int


def resolve(
    selection: torch.Tensor,
    rows: torch.Tensor,
    seats: torch.Tensor,
    layer: LayerSeats,
    *,
    block_size: int,
    rows_per_block: int,
    rows_per_token: int,
    is_guess: bool = False,
) -> Misses:
    """See `resolve_rows.resolve_rows`; waits for the device."""
    misses = Misses(
        torch.zeros_like(selection),
        torch.zeros_like(selection),
        selection.new_zeros(len(selection)),
    )
    for token, seat in enumerate(seats.tolist()):
        if seat < 0:
            continue
        positions, found, order = selection[token], rows[token], layer.order[seat].long()
        blocks = layer.slot_blocks[seat]
        slot_rows = blocks[order // block_size] * rows_per_block
        slot_rows += (order % block_size).int() * rows_per_token
        # [S, K]: whether a slot, in order, holds a selected token that is not resident.
        is_wanted = (positions >= 0) & (found < 0)
        held = layer.token_in[seat][order]
        matches = (held[:, None] == positions) & is_wanted
        is_hit = matches.any(1)
        ranks = matches[is_hit].int().argmax(1)
        found[ranks] = slot_rows[is_hit]

        missing = ((positions >= 0) & (found < 0)).nonzero()[:, 0]
        unused, count = order[~is_hit], len(missing)
        goals = slot_rows[~is_hit][:count]
        wanted = positions[missing]
        host = layer.host[seat][wanted // block_size]
        totals, (first, end) = layer.totals[seat], layer.ahead[seat].tolist()
        totals[Total.LOST] += (host < 0).sum()
        totals[Total.GUESSED if is_guess else Total.MISSED] += count
        if not is_guess:
            totals[Total.HIT] += is_hit.sum()
            totals[Total.GUESSED_RIGHT] += is_hit[first:end].sum()
        num_rest = len(unused) - count
        layer.ahead[seat] = host.new_tensor([num_rest, num_rest + count] if is_guess else [0, 0])
        found[missing] = goals
        layer.token_in[seat][unused[:count]] = wanted
        parts = [unused[count:], unused[:count], order[is_hit]]
        layer.order[seat] = torch.cat(parts).to(layer.order.dtype)
        misses.counts[token] = count
        misses.rows[token, :count] = goals
        misses.places[token, :count] = host.clamp_min(0) * block_size + wanted % block_size
    return misses


def gather(
    source: torch.Tensor,
    target: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    run: RowRun,
) -> None:
    """See `gather_rows.gather_rows`; waits for the device."""
    listed = torch.arange(places.shape[1], device=counts.device) < counts[:, None]
    place, row = places[listed].to(source.device).long(), rows[listed].long()
    inside = torch.arange(run.num_layers * run.row_bytes)
    origin = run.start_bytes + place % run.block_size * run.rows_per_token * run.row_bytes
    goal = run.start_bytes + row % run.rows_per_block * run.row_bytes
    slots, blocks = place // run.block_size, row // run.rows_per_block
    words = source[slots[:, None], origin[:, None] + inside.to(source.device)]
    target[blocks[:, None], goal[:, None] + inside.to(target.device)] = words.to(target.device)
