"""Which device block is in which state. Knows ids and hashes, no tokens and no tensors."""

from collections import OrderedDict

from hotset.errors import OutOfBlocksError


class BlockPool:
    """Reference-counted block ids. Each block is in one state at a time.

    free   -- ref count 0, no content; handed out first
    cached -- ref count 0, content findable by hash; evicted oldest first
    held   -- ref count >= 1; never evicted

    A held block may be findable too, once its content is complete (`publish`).
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._ref_count = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        """Blocks without content: `allocate` hands them out before it evicts anything."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds whose content can be found."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks with a ref count of 1 or more."""
        return self.num_blocks - self.num_available

    def ref_count(self, block: int) -> int:
        """How many holders `block` has."""
        return self._ref_count[block]

    def is_shared(self, block: int) -> bool:
        """Whether others hold `block` too, or can find it: then it must not be written to."""
        return self._ref_count[block] > 1 or block in self._hash_of

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks, evicting cached ones once no free one is left.

        Raises:
            OutOfBlocksError: fewer than `n` are available; the pool is unchanged.
        """
        if n > self.num_available:
            raise OutOfBlocksError(f"asked for {n} blocks, {self.num_available} available")
        blocks = [self._free.pop() if self._free else self._evict_oldest() for _ in range(n)]
        for block in blocks:
            self._ref_count[block] = 1
        return blocks

    def lookup(self, key: bytes) -> int | None:
        """The block whose published content has hash `key`; takes no reference."""
        return self._block_of.get(key)

    def acquire(self, key: bytes) -> int | None:
        """Find a published block by hash and hold it."""
        block = self._block_of.get(key)
        if block is not None:
            self.hold(block)
        return block

    def hold(self, block: int) -> None:
        """Add a reference to a held or cached block."""
        self._cached.pop(block, None)
        self._ref_count[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference. The last one leaves the block cached if published, else free."""
        assert self._ref_count[block] > 0, f"block {block} released more often than held"
        self._ref_count[block] -= 1
        if self._ref_count[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Make the complete content of held `block` findable by `key`.

        Where another block has that content already, that one stays the findable one.
        """
        assert self._ref_count[block] > 0, f"block {block} published but not held"
        if key not in self._block_of and block not in self._hash_of:
            self._block_of[key] = block
            self._hash_of[block] = key

    def forget_cached(self) -> None:
        """Drop the content of every cached block; they become free."""
        while self._cached:
            self._free.append(self._evict_oldest())

    def _evict_oldest(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def check(self) -> None:
        """Assert the invariants of the class docstring."""
        free, cached = set(self._free), set(self._cached)
        held = {b for b, count in enumerate(self._ref_count) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is free and cached"
        assert not free & held and not cached & held, "a block is held and available"
        assert free | cached | held == set(range(self.num_blocks)), "a block is in no state"
        assert all(count >= 0 for count in self._ref_count), "a ref count is negative"
        assert cached <= self._hash_of.keys(), "a cached block has no hash"
        assert not free & self._hash_of.keys(), "a free block has a hash"
        assert {b: k for k, b in self._block_of.items()} == self._hash_of, "hash maps differ"
