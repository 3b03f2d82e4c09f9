"""Blocks of index keys alone, carved from those of the pool. Imports no torch."""

import math

from hotset.kv.pool import BlockPool


def fewest_per_block(row_bytes: int, index_bytes: int) -> int:
    """Index blocks that any block of a pool has room for; see `IndexBlocks`."""
    period = index_bytes // math.gcd(row_bytes, index_bytes)
    return min(len(_within(block, row_bytes, index_bytes)) for block in range(period))


def _within(block: int, row_bytes: int, index_bytes: int) -> range:
    """The index blocks that lie in the rows of one block, counted from those of block 0."""
    start = -(-block * row_bytes // index_bytes)
    return range(start, (block + 1) * row_bytes // index_bytes)


class IndexBlocks:
    """Takes blocks from a pool and hands out the room for rows in them as index blocks.

    On the device the index keys of all blocks lie in one row, and the rows of all blocks after
    them. That row of index keys goes on through the memory of rows: what lies there within one
    block is that block's index blocks. Their ids are above those of the pool, so that a table can
    name both. A block of the pool goes back once none of its index blocks is in use.

    Args:
        pool: of whole blocks.
        first: the first id of an index block: the whole blocks that the device has.
        row_bytes: of a token in all layers.
        index_bytes: of the index keys of a token.

    Attributes:
        fewest_per_block: index blocks that any block of the pool has room for.
    """

    def __init__(self, pool: BlockPool, *, first: int, row_bytes: int, index_bytes: int) -> None:
        self.fewest_per_block = fewest_per_block(row_bytes, index_bytes)
        assert self.fewest_per_block and first >= pool.num_blocks
        self._pool, self._first = pool, first
        self._row_bytes, self._index_bytes = row_bytes, index_bytes
        self._free: dict[int, list[int]] = {}  # carved block -> its index blocks that are free
        self._num_used = 0

    @property
    def num_used(self) -> int:
        """Index blocks that were handed out."""
        return self._num_used

    @property
    def can_take(self) -> bool:
        """Whether there is an index block to be had."""
        return any(self._free.values()) or self._pool.num_available > 0

    def take(self) -> int:
        """An index block; raises OutOfBlocksError where the pool has no block to carve."""
        carved = next((block for block, free in self._free.items() if free), None)
        if carved is None:
            [carved] = self._pool.allocate(1)
            self._free[carved] = list(self._within(carved))
        self._num_used += 1
        return self._free[carved].pop()

    def give_back(self, block: int) -> None:
        """An index block is free."""
        carved = (block - self._first) * self._index_bytes // self._row_bytes
        free = self._free[carved]
        assert block not in free, f"index block {block} was given back twice"
        free.append(block)
        self._num_used -= 1
        if len(free) == len(self._within(carved)):
            del self._free[carved]
            self._pool.release(carved)

    def _within(self, block: int) -> range:
        found = _within(block, self._row_bytes, self._index_bytes)
        return range(self._first + found.start, self._first + found.stop)

    def check(self) -> None:
        """Assert that each carved block is held, and that the counts agree."""
        num_used = 0
        for carved, free in self._free.items():
            assert self._pool.ref_count(carved) == 1, "a carved block is shared or free"
            within = self._within(carved)
            assert len(set(free)) == len(free) < len(within) and set(free) <= set(within)
            num_used += len(within) - len(free)
        assert num_used == self._num_used
