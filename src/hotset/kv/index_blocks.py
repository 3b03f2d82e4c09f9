"""Blocks of index keys alone, carved from those of the pool. Imports no torch."""

import math

from hotset.cost.cache_spec import KEYS_ALONE, index_places
from hotset.kv.pool import BlockPool


def fewest_per_block(row_bytes: int, index_bytes: int) -> int:
    """Index blocks that any block of a pool has room for; see `IndexBlocks`."""
    period = index_bytes // math.gcd(row_bytes, index_bytes)
    return 1 + min(len(index_places(i, row_bytes, index_bytes)) for i in range(period))


class IndexBlocks:
    """Takes blocks from a pool and hands out the room in them as index blocks.

    On the device the index keys of all blocks lie in one row, and the rows of all blocks after
    them. That row of index keys goes on through the memory of rows: what lies there within one
    block is that block's index blocks, and so is the place of its own index keys. An id is a number
    in that row with `KEYS_ALONE`, so that a table can name both kinds. A block of the pool goes
    back once none of its index blocks is in use.

    Args:
        pool: of whole blocks.
        first: the number of the first place within rows: the whole blocks that the device has.
        row_bytes: of a token in all layers.
        index_bytes: of the index keys of a token.

    Attributes:
        fewest_per_block: index blocks that any block of the pool has room for.
    """

    def __init__(self, pool: BlockPool, *, first: int, row_bytes: int, index_bytes: int) -> None:
        self.fewest_per_block = fewest_per_block(row_bytes, index_bytes)
        assert first >= pool.num_blocks
        self._pool, self._first = pool, first
        self._row_bytes, self._index_bytes = row_bytes, index_bytes
        self._carved: dict[int, set[int]] = {}  # block -> its index blocks that are free
        self._open: dict[int, None] = {}  # carved blocks with a free part, first carved first
        self._own: set[int] = set()  # blocks not carved whose own index keys are an index block
        self._num_used = 0

    @property
    def num_used(self) -> int:
        """Index blocks that were handed out."""
        return self._num_used

    @property
    def num_free(self) -> int:
        """Index blocks that no block has to be carved for."""
        return sum(len(self._carved[block]) for block in self._open)

    @property
    def can_take(self) -> bool:
        """Whether there is an index block to be had."""
        return bool(self._open) or self._pool.num_available > 0

    def take(self) -> int:
        """An index block; raises OutOfBlocksError where the pool has no block to carve."""
        if not self._open:
            [carved] = self._pool.allocate(1)
            self._carved[carved] = self._within(carved)
            self._open[carved] = None
        carved = next(iter(self._open))
        free = self._carved[carved]
        block = free.pop()
        if not free:
            del self._open[carved]
        self._num_used += 1
        return block

    def keep_own(self, block: int) -> int:
        """The index block that a block's own index keys are, while its rows serve as slots.

        The block stays held until the index block is given back.
        """
        assert block < self._first and block not in self._carved and block not in self._own
        self._own.add(block)
        self._num_used += 1
        return block | KEYS_ALONE

    def own_block(self, block: int) -> int | None:
        """The block that keeps its own index keys as this index block; None for a carved one."""
        number = block ^ KEYS_ALONE
        return number if number in self._own else None

    def give_back(self, block: int) -> None:
        """An index block is free."""
        self._num_used -= 1
        number = block ^ KEYS_ALONE
        if number in self._own:
            self._own.remove(number)
            return
        carved = number
        if number >= self._first:
            carved = (number - self._first) * self._index_bytes // self._row_bytes
        free = self._carved[carved]
        assert block not in free, f"index block {block} was given back twice"
        free.add(block)
        self._open[carved] = None
        if len(free) == len(self._within(carved)):
            del self._carved[carved], self._open[carved]
            self._pool.release(carved)

    def _within(self, block: int) -> set[int]:
        within = index_places(block, self._row_bytes, self._index_bytes)
        return {number | KEYS_ALONE for number in (block, *(self._first + i for i in within))}

    def check(self) -> None:
        """Assert that each carved block is held, and that the counts agree."""
        num_used = len(self._own)
        for carved, free in self._carved.items():
            assert self._pool.ref_count(carved) == 1, "a carved block is shared or free"
            within = self._within(carved)
            assert free < within and bool(free) == (carved in self._open)
            num_used += len(within) - len(free)
        assert not self._own & self._carved.keys() and self._open.keys() <= self._carved.keys()
        assert num_used == self._num_used
