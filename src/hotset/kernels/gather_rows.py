"""Copying rows of tokens from pinned host memory to the device, listed by the device."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hotset.cost.tuning import TUNINGS, Tuning


class RowRun(NamedTuple):
    """Where one layer's rows are in a block on the device, and in a slot of host memory.

    The rows of a block's tokens follow one another.

    Attributes:
        start_bytes: of the layer's first row in its block.
        row_bytes: of a row.
        block_size: rows that follow one another: tokens of a block.
    """

    start_bytes: int
    row_bytes: int
    block_size: int


@triton.jit  # type: ignore[untyped-decorator]
def _gather_rows(  # type: ignore[no-untyped-def]
    source,
    target,
    places,
    rows,
    counts,
    start,
    most_listed,
    SLOT_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    seat = tl.program_id(1)
    count = tl.load(counts + seat)
    listed = seat.to(tl.int64) * most_listed
    i = tl.arange(0, WIDTH)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        which = first + tl.arange(0, ROWS)
        is_listed = which < count
        place = tl.load(places + listed + which, mask=is_listed, other=0).to(tl.int64)
        row = tl.load(rows + listed + which, mask=is_listed, other=0).to(tl.int64)
        # Strides are constants, so that the compiler knows how rows are aligned and loads 16 bytes.
        origin = place // BLOCK_SIZE * SLOT_WORDS + place % BLOCK_SIZE * ROW_WORDS + start
        goal = row // BLOCK_SIZE * BLOCK_WORDS + row % BLOCK_SIZE * ROW_WORDS + start
        inside = is_listed[:, None] & (i < ROW_WORDS)[None, :]
        words = tl.load(source + origin[:, None] + i[None, :], mask=inside)
        tl.store(target + goal[:, None] + i[None, :], words, mask=inside)


def gather_rows(
    source: torch.Tensor,
    target: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    run: RowRun,
    *,
    tuning: Tuning = TUNINGS["cuda"],
) -> None:
    """Copy the first `counts[b]` listed rows of each seat from host memory, in place.

    B = seats, M = rows that a seat can list.

    Args:
        source: `[host slots, bytes]` uint8, contiguous; pinned host memory, which the device reads
            itself.
        target: `[device blocks, bytes]` uint8 on the device, contiguous. Mutated.
        places: `[B, M]` int32 on the device, contiguous: of a row in host memory its slot times
            `block_size`, plus its offset.
        rows: `[B, M]` int32 on the device, contiguous: of a row in `target` its block times
            `block_size`, plus its offset. Listed ones are distinct.
        counts: `[B]` int32 on the device.
        run: where the layer's rows are; its sizes in bytes are multiples of 8, of 16 for loads of
            16 bytes.
        tuning: how many programs share the work.

    Cost: one launch; the listed rows over the link. Nothing is asked of the host, so that a CUDA
    graph can record it.
    Reference: `tests/kernels/test_gather_rows.py`, bit-exact.
    """
    num_seats, most_listed = places.shape
    words, goals = source.view(torch.int64), target.view(torch.int64)
    row_words = run.row_bytes // 8
    num_programs = max(1, tuning.gather_programs // num_seats)
    _gather_rows[(num_programs, num_seats)](
        words,
        goals,
        places,
        rows,
        counts,
        run.start_bytes // 8,
        most_listed,
        SLOT_WORDS=words.shape[1],
        BLOCK_WORDS=goals.shape[1],
        ROW_WORDS=row_words,
        BLOCK_SIZE=run.block_size,
        ROWS=tuning.gather_rows,
        WIDTH=triton.next_power_of_2(row_words),
        num_warps=4,
    )
