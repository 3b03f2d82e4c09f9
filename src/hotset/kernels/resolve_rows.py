"""Where selected tokens of hot requests are on the device, and which of them must come there."""

import torch
import triton
import triton.language as tl

from hotset.kernels.hot_reference import LayerSeats, Misses

_AT_ONCE = 1024  # tokens or slots that a program looks at together


@triton.jit  # type: ignore[untyped-decorator]
def _resolve_seat(  # type: ignore[no-untyped-def]
    selection,
    rows,
    places,
    goals,
    count,
    host,
    slot_blocks,
    token_in,
    order,
    rank_of,
    spare,
    ahead,
    totals,
    num_selected,
    num_slots,
    rows_per_block,
    rows_per_token,
    BLOCK_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_GUESS: tl.constexpr,
):
    # One program, whose threads tell each other through memory: barriers order that.
    i = tl.arange(0, AT_ONCE)
    for first in range(0, num_selected, AT_ONCE):
        k = first + i
        position = tl.load(selection + k, mask=k < num_selected, other=-1)
        row = tl.load(rows + k, mask=k < num_selected, other=0)
        tl.store(rank_of + position, k.to(tl.int16), mask=(position >= 0) & (row < 0))
    tl.debug_barrier()
    # Slots that stay unused go to the front of `spare`, in order; those of hits to its end,
    # backwards.
    num_unused = 0
    num_guessed = 0
    guessed_first, guessed_end = tl.load(ahead), tl.load(ahead + 1)
    for first in range(0, num_slots, AT_ONCE):
        place = first + i
        is_slot = place < num_slots
        slot = tl.load(order + place, mask=is_slot, other=0).to(tl.int32)
        position = tl.load(token_in + slot, mask=is_slot, other=-1)
        rank = tl.load(rank_of + position, mask=position >= 0, other=-1).to(tl.int32)
        is_hit = rank >= 0
        block = tl.load(slot_blocks + slot // BLOCK_SIZE, mask=is_hit, other=0)
        found = block * rows_per_block + slot % BLOCK_SIZE * rows_per_token
        tl.store(rows + rank, found, mask=is_hit)
        unused = (is_slot & (rank < 0)).to(tl.int32)
        before = num_unused + tl.cumsum(unused, 0) - unused
        goal = tl.where(is_hit, num_slots - 1 - (place - before), before)
        tl.store(spare + goal, slot.to(tl.int16), mask=is_slot)
        num_unused += tl.sum(unused)
        is_guessed = is_hit & (place >= guessed_first) & (place < guessed_end)
        num_guessed += tl.sum(is_guessed.to(tl.int32))
    tl.debug_barrier()
    num_misses = 0
    num_lost = 0
    for first in range(0, num_selected, AT_ONCE):
        k = first + i
        position = tl.load(selection + k, mask=k < num_selected, other=-1)
        row = tl.load(rows + k, mask=k < num_selected, other=0)
        is_miss = (position >= 0) & (row < 0)
        miss = is_miss.to(tl.int32)
        rank = num_misses + tl.cumsum(miss, 0) - miss
        slot = tl.load(spare + rank, mask=is_miss, other=0).to(tl.int32)
        block = tl.load(slot_blocks + slot // BLOCK_SIZE, mask=is_miss, other=0)
        goal = block * rows_per_block + slot % BLOCK_SIZE * rows_per_token
        host_slot = tl.load(host + position // BLOCK_SIZE, mask=is_miss, other=0)
        num_lost += tl.sum((host_slot < 0).to(tl.int32))
        place = tl.maximum(host_slot, 0) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(rows + k, goal, mask=is_miss)
        tl.store(goals + rank, goal, mask=is_miss)
        tl.store(places + rank, place, mask=is_miss)
        tl.store(token_in + slot, position, mask=is_miss)
        nowhere = tl.full((AT_ONCE,), -1, tl.int16)
        tl.store(rank_of + position, nowhere, mask=position >= 0)
        num_misses += tl.sum(miss)
    num_rest = num_unused - num_misses
    for first in range(0, num_slots, AT_ONCE):
        place = first + i
        rest = tl.where(place < num_rest, place + num_misses, place - num_rest)
        at = tl.where(place < num_unused, rest, num_slots - 1 - (place - num_unused))
        slot = tl.load(spare + at, mask=place < num_slots, other=0)
        tl.store(order + place, slot, mask=place < num_slots)
    tl.store(count, num_misses)
    tl.store(totals + 2, tl.load(totals + 2) + num_lost)
    if IS_GUESS:
        tl.store(ahead, num_rest)
        tl.store(ahead + 1, num_unused)
        tl.store(totals + 3, tl.load(totals + 3) + num_misses)
    else:
        tl.store(ahead, 0)
        tl.store(ahead + 1, 0)
        tl.store(totals, tl.load(totals) + num_slots - num_unused)
        tl.store(totals + 1, tl.load(totals + 1) + num_misses)
        tl.store(totals + 4, tl.load(totals + 4) + num_guessed)


@triton.jit(do_not_specialize=["rows_per_token"])  # type: ignore[untyped-decorator]
def _resolve_rows(  # type: ignore[no-untyped-def]
    selection,
    rows,
    seats,
    places,
    goals,
    counts,
    host,
    slot_blocks,
    token_in,
    order,
    rank_of,
    spare,
    ahead,
    totals,
    num_selected,
    num_slots,
    num_blocks,
    most_tokens,
    rows_per_block,
    rows_per_token,
    BLOCK_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_GUESS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    seat = tl.load(seats + token).to(tl.int64)
    if seat < 0:
        tl.store(counts + token, 0)
    else:
        _resolve_seat(
            selection + token * num_selected,
            rows + token * num_selected,
            places + token * num_selected,
            goals + token * num_selected,
            counts + token,
            host + seat * num_blocks,
            slot_blocks + seat * (num_slots // BLOCK_SIZE),
            token_in + seat * num_slots,
            order + seat * num_slots,
            rank_of + seat * most_tokens,
            spare + seat * num_slots,
            ahead + seat * 2,
            totals + seat * 5,
            num_selected,
            num_slots,
            rows_per_block,
            rows_per_token,
            BLOCK_SIZE,
            AT_ONCE,
            IS_GUESS,
        )


def resolve_rows(
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
    """Find the rows of selected tokens in the slots of hot requests, in place, and choose slots.

    T = tokens of the step, K = selected tokens, at most S. A token that no slot holds takes the one
    that was unused for longest. What this step uses counts as used after all else: in `order` the
    slots of this step's misses follow the unused ones, then those of its hits. That is exact LRU,
    without a sort.

    A guess of what a layer will select is resolved likewise, so that the missing rows can come
    ahead. The selection is resolved after it, whatever was guessed: a wrong guess has taken slots
    and bytes, and changes no row that is attended to.

    Args:
        selection: `[T, K]` int32, contiguous: positions, distinct, -1 for none.
        rows: `[T, K]` int32, contiguous: the device row of each, -1 where it is not resident. The
            rows of hot requests are completed.
        seats: `[T]` int32 or int64: of each token's request, -1 where it is not hot. Distinct.
        layer: the tables. `token_in`, `order`, `ahead` and `totals` are changed.
        block_size: tokens of a block.
        rows_per_block: device rows from one block to the next, see `RowRun`.
        rows_per_token: likewise from one token to the next.
        is_guess: whether `selection` is guessed; its hits and misses are counted apart.

    Returns:
        The rows to gather, in the order of the selection.

    Cost: one launch of one program per token, which ends at once where the request is not hot.
    Nothing is asked of the host, so that a CUDA graph can record it.
    Source: an LRU whose order is rebuilt by stable partition, as HiSparse keeps its slots
    (sgl-project/sglang#20343).
    Reference: `hot_reference.resolve`, bit-exact.
    """
    num_tokens, num_selected = selection.shape
    num_slots = layer.order.shape[1]
    misses = Misses(
        torch.empty_like(selection), torch.empty_like(selection), selection.new_empty(num_tokens)
    )
    _resolve_rows[(num_tokens,)](
        selection,
        rows,
        seats,
        *misses,
        *layer,
        num_selected,
        num_slots,
        layer.host.shape[1],
        layer.rank_of.shape[1],
        rows_per_block,
        rows_per_token,
        BLOCK_SIZE=block_size,
        AT_ONCE=_AT_ONCE,
        IS_GUESS=is_guess,
        num_warps=8,
    )
    return misses
