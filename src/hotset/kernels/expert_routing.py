"""Which rows each expert computes, and in which blocks, decided on the device."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Ids that a program looks at together: all those of 32 tokens with 8 experts each, or of 256.
_CHUNKS = (256, 2048)


@dataclass(frozen=True)
class Routing:
    """Rows by expert, cut into blocks that one program of a product computes.

    R = rows, one for each token and place among its top-k; B = blocks at most. Row r belongs to
    token `r // K`. All is on the device and of fixed shape; the host knows none of the values.

    Attributes:
        ids: `[R]` integer, as the router gave them; those of E and more are nobody's.
        rows: `[R]` int32, the rows sorted by expert, in order within one. Anything at the end, in
            as many places as there are rows that are nobody's.
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
    # A program an expert. Each counts the rows of all, so that none has to wait for another.
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
    place = first
    for start in range(0, num_rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        found = tl.load(ids + row, mask=row < num_rows, other=NUM_EXPERTS)
        is_mine = found == expert
        ahead = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(rows + place + ahead - 1, row, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32))
    for start in range(first, end, block_rows):
        block = blocks + 3 * (first_block + (start - first) // block_rows)
        tl.store(block, expert)
        tl.store(block + 1, start)
        tl.store(block + 2, tl.minimum(start + block_rows, end))


def route_rows(ids: torch.Tensor, num_experts: int, block_rows: int) -> Routing:
    """Sort rows by expert and cut them into blocks, in one launch.

    Args:
        ids: `[R]` integer expert ids, not negative, on the device, contiguous; those of
            `num_experts` and more are nobody's.
        num_experts: E.
        block_rows: rows of a block at most.

    Cost: each of E programs reads all ids twice, mostly from L2. Nothing is asked of the host, so
    that a CUDA graph can record it.
    Reference: `tests/kernel/test_expert_routing.py`, exact.
    """
    num_rows = len(ids)
    places = ids.new_empty(num_rows, dtype=torch.int32)
    # Each expert leaves at most one block unfilled, and there are no blocks without rows.
    most_blocks = min(num_rows, (num_rows + num_experts * (block_rows - 1)) // block_rows)
    blocks = ids.new_empty(most_blocks, 3, dtype=torch.int32)
    num_blocks = ids.new_empty(1, dtype=torch.int32)
    if num_rows == 0:
        return Routing(ids, places, blocks, num_blocks.zero_())
    _route[(num_experts,)](
        ids,
        places,
        blocks,
        num_blocks,
        num_rows,
        block_rows,
        NUM_EXPERTS=num_experts,
        BINS=triton.next_power_of_2(num_experts + 1),
        CHUNK=_CHUNKS[num_rows > _CHUNKS[0]],
        num_warps=8,
    )
    return Routing(ids, places, blocks, num_blocks)
