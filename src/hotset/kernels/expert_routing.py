"""Which rows each expert computes, and in which blocks, decided on the device."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Ids that a program looks at together: of 32 tokens with 8 experts each, or of 256 tokens.
_CHUNKS = (256, 2048)
# From this many rows on, a launch of its own counts them and several programs place one expert's.
_ROWS_COUNTED_FIRST = 8192
_PARTS = 8


@dataclass(frozen=True)
class Routing:
    """Rows by expert, cut into blocks that one program of a product computes.

    R = rows, one for each token and place among its top-k; B = blocks at most. Row r belongs to
    token `r // K`. All is on the device and of fixed shape; the host knows none of the values.

    Attributes:
        ids: `[R]` integer, as the router gave them; ids of E and more belong to no expert here.
        rows: `[R]` int32, the rows sorted by expert, in order within one. Anything at the end, in
            as many places as there are rows without an expert here.
        blocks: `[B, 3]` int32: the block's expert, and its first and last place in `rows`, the
            last one excluded. Blocks of an expert follow each other. Anything from `num_blocks` on.
        num_blocks: `[1]` int32.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    blocks: torch.Tensor
    num_blocks: torch.Tensor


@triton.jit(do_not_specialize=["num_rows", "block_rows"])  # type: ignore[untyped-decorator]
def _route(  # type: ignore[no-untyped-def]
    ids,
    rows,
    blocks,
    num_blocks,
    num_rows,
    block_rows,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # One program per expert. Each counts the rows of all, so that none has to wait for another.
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        found = tl.load(ids + row, mask=row < num_rows, other=NUM_EXPERTS)
        counts += tl.histogram(tl.minimum(found, NUM_EXPERTS).to(tl.int32), BINS)
    counts = tl.where(bins < NUM_EXPERTS, counts, 0)
    needed = (counts + block_rows - 1) // block_rows
    first = tl.sum(tl.where(bins < expert, counts, 0))
    end = first + tl.sum(tl.where(bins == expert, counts, 0))
    first_block = tl.sum(tl.where(bins < expert, needed, 0))
    if expert == 0:
        tl.store(num_blocks, tl.sum(needed))
    if first == end:
        return
    _place(ids, rows, expert, first, 0, num_rows, num_rows, NUM_EXPERTS, CHUNK)
    _cut(blocks, expert, first, end, first_block, block_rows)


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    ids, rows, expert, place, start, end, num_rows, NUM_EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):
    """Write the rows of an expert among `[start, end)`, in order, from `place` on."""
    for at in range(start, end, CHUNK):
        row = at + tl.arange(0, CHUNK)
        found = tl.load(ids + row, mask=row < num_rows, other=NUM_EXPERTS)
        is_mine = found == expert
        ahead = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(rows + place + ahead - 1, row, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32))


@triton.jit
def _cut(blocks, expert, first, end, first_block, block_rows):  # type: ignore[no-untyped-def]
    """Write the blocks of an expert."""
    for start in range(first, end, block_rows):
        block = blocks + 3 * (first_block + (start - first) // block_rows)
        tl.store(block, expert)
        tl.store(block + 1, start)
        tl.store(block + 2, tl.minimum(start + block_rows, end))


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]
    ids, counts, num_rows, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr
):
    # One program per chunk.
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(ids + row, mask=row < num_rows, other=NUM_EXPERTS)
    count = tl.histogram(tl.minimum(found, NUM_EXPERTS).to(tl.int32), BINS)
    bins = tl.arange(0, BINS)
    count = tl.where(bins < NUM_EXPERTS, count, 0)
    tl.store(counts + tl.program_id(0) * BINS + bins, count)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_rows", "num_chunks", "block_rows"]
)
def _route_counted(  # type: ignore[no-untyped-def]
    ids,
    counts,
    rows,
    blocks,
    num_blocks,
    num_rows,
    num_chunks,
    block_rows,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # Programs of an expert share its chunks.
    expert, part = tl.program_id(0), tl.program_id(1)
    bins = tl.arange(0, BINS)
    per_part = tl.cdiv(num_chunks, tl.num_programs(1))
    first_chunk = part * per_part
    totals = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)  # in chunks of other parts
    for start in range(0, num_chunks, AT_ONCE):
        chunk = start + tl.arange(0, AT_ONCE)[:, None]
        found = tl.load(counts + chunk * BINS + bins[None, :], mask=chunk < num_chunks, other=0)
        totals += tl.sum(found, 0)
        before += tl.sum(tl.where(chunk < first_chunk, found, 0), 0)
    needed = (totals + block_rows - 1) // block_rows
    first = tl.sum(tl.where(bins < expert, totals, 0))
    end = first + tl.sum(tl.where(bins == expert, totals, 0))
    if part == 0:
        if expert == 0:
            tl.store(num_blocks, tl.sum(needed))
        first_block = tl.sum(tl.where(bins < expert, needed, 0))
        _cut(blocks, expert, first, end, first_block, block_rows)
    if first == end:
        return
    place = first + tl.sum(tl.where(bins == expert, before, 0))
    last_chunk = tl.minimum(first_chunk + per_part, num_chunks)
    _place(
        ids,
        rows,
        expert,
        place,
        first_chunk * CHUNK,
        last_chunk * CHUNK,
        num_rows,
        NUM_EXPERTS,
        CHUNK,
    )


def route_rows(ids: torch.Tensor, num_experts: int, block_rows: int) -> Routing:
    """Sort rows by expert and cut them into blocks, in one launch, or two where there are many.

    Args:
        ids: `[R]` integer expert ids, not negative, on the device, contiguous; ids of
            `num_experts` and more belong to no expert here.
        num_experts: E.
        block_rows: rows of a block at most.

    Cost: each of E programs reads all ids twice, mostly from L2; of many rows all are counted once
    and read once more for each expert. Nothing is asked of the host, so that a CUDA graph can
    record it.
    Reference: `tests/kernels/test_expert_routing.py`, exact.
    """
    num_rows = len(ids)
    places = ids.new_empty(num_rows, dtype=torch.int32)
    # Each expert leaves at most one block unfilled, and there are no blocks without rows.
    most_blocks = min(num_rows, (num_rows + num_experts * (block_rows - 1)) // block_rows)
    blocks = ids.new_empty(most_blocks, 3, dtype=torch.int32)
    num_blocks = ids.new_empty(1, dtype=torch.int32)
    if num_rows == 0:
        return Routing(ids, places, blocks, num_blocks.zero_())
    bins = triton.next_power_of_2(num_experts + 1)
    if num_rows <= _ROWS_COUNTED_FIRST:
        _route[(num_experts,)](
            ids,
            places,
            blocks,
            num_blocks,
            num_rows,
            block_rows,
            NUM_EXPERTS=num_experts,
            BINS=bins,
            CHUNK=_CHUNKS[num_rows > _CHUNKS[0]],
            num_warps=8,
        )
        return Routing(ids, places, blocks, num_blocks)
    chunk = _CHUNKS[-1]
    num_chunks = triton.cdiv(num_rows, chunk)
    counts = ids.new_empty(num_chunks, bins, dtype=torch.int32)
    _count[(num_chunks,)](
        ids, counts, num_rows, NUM_EXPERTS=num_experts, BINS=bins, CHUNK=chunk, num_warps=8
    )
    _route_counted[(num_experts, min(num_chunks, _PARTS))](
        ids,
        counts,
        places,
        blocks,
        num_blocks,
        num_rows,
        num_chunks,
        block_rows,
        NUM_EXPERTS=num_experts,
        BINS=bins,
        CHUNK=chunk,
        AT_ONCE=max(1, 4096 // bins),
        num_warps=8,
    )
    return Routing(ids, places, blocks, num_blocks)
