"""Copying rows of tokens from pinned host memory to the device, listed by the device."""

import torch
import triton
import triton.language as tl

from hotset.cost.tuning import TUNINGS, Tuning
from hotset.kernels.hot_reference import RowRun


@triton.jit  # type: ignore[untyped-decorator]
def _gather_rows(  # type: ignore[no-untyped-def]
    source,
    target,
    places,
    rows,
    counts,
    start,
    num_seats,
    most_listed,
    SLOT_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    ROWS_PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i = tl.arange(0, WIDTH)
    for seat in range(tl.program_id(1), num_seats, tl.num_programs(1)):
        count = tl.load(counts + seat)
        listed = tl.cast(seat, tl.int64) * most_listed
        for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
            which = first + tl.arange(0, ROWS)
            is_listed = which < count
            place = tl.load(places + listed + which, mask=is_listed, other=0).to(tl.int64)
            row = tl.load(rows + listed + which, mask=is_listed, other=0).to(tl.int64)
            # Strides are constants, so that the compiler knows how rows are aligned and loads
            # 16 bytes.
            offset = place % BLOCK_SIZE * ROWS_PER_TOKEN
            origin = place // BLOCK_SIZE * SLOT_WORDS + offset * ROW_WORDS + start
            goal = row // ROWS_PER_BLOCK * BLOCK_WORDS + row % ROWS_PER_BLOCK * ROW_WORDS + start
            inside = is_listed[:, None] & (i < NUM_WORDS)[None, :]
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
        places: `[B, M]` int32 on the device, contiguous: numbers of tokens in `source`.
        rows: `[B, M]` int32 on the device, contiguous: their numbers in `target`, distinct.
        counts: `[B]` int32 on the device.
        run: where their rows are, and how they are numbered; its sizes in bytes are multiples of 8,
            of 16 for loads of 16 bytes.
        tuning: how many programs share the work, and how many rows each has under way.

    Cost: one launch; the listed rows over the link. Nothing is asked of the host, so that a CUDA
    graph can record it.
    Reference: `hot_reference.gather`, bit-exact.
    """
    num_seats, most_listed = places.shape
    words, goals = source.view(torch.int64), target.view(torch.int64)
    row_words = run.row_bytes // 8
    num_words = run.num_layers * row_words
    num_programs = max(1, tuning.gather_programs // num_seats)
    _gather_rows[(num_programs, min(num_seats, tuning.gather_programs))](
        words,
        goals,
        places,
        rows,
        counts,
        run.start_bytes // 8,
        num_seats,
        most_listed,
        SLOT_WORDS=words.shape[1],
        BLOCK_WORDS=goals.shape[1],
        ROW_WORDS=row_words,
        NUM_WORDS=num_words,
        BLOCK_SIZE=run.block_size,
        ROWS_PER_BLOCK=run.rows_per_block,
        ROWS_PER_TOKEN=run.rows_per_token,
        ROWS=tuning.gather_rows,
        WIDTH=triton.next_power_of_2(num_words),
        num_warps=tuning.gather_rows,
    )
