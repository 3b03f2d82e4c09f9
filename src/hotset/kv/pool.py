"""Which device block is in which state. Knows ids and hashes, no tokens and no tensors."""

from bisect import insort

from hotset.errors import OutOfBlocksError
from hotset.eviction import Order, policy_named
from hotset.memory.journal import OnChange


class BlockPool:
    """Reference-counted block ids. Each block is in one state at a time.

    free   -- ref count 0, no content; handed out first
    cached -- ref count 0, content findable by hash; evicted as the policy says
    held   -- ref count >= 1; never evicted

    A held block may be findable too, once its content is complete (`publish`).

    Memory below a boundary, the start of block `first`, may serve something else: blocks there are
    in no state. Before the boundary can be raised (`lend`), blocks above it have to become free:
    those of `hand_out_last` are never cached, and of others that are free the highest go first.

    Args:
        num_blocks: ids are below it.
        first: the lowest id in the pool at first; 0 for a pool without a boundary.
        eviction: the name of a policy in `eviction`.

    Attributes:
        on_change: see `journal.Source`.
    """

    def __init__(self, num_blocks: int, first: int = 0, *, eviction: str = "lru") -> None:
        self.num_blocks = num_blocks
        self.first = first
        self._has_boundary = first > 0
        self._free = list(range(num_blocks - 1, -1, -1))
        if self._has_boundary:
            self._free = list(range(first, num_blocks))  # sorted
        self._last = first  # free blocks below it are in `_near` instead
        self._near: list[int] = []  # sorted
        self._cached: Order[int] = policy_named(eviction).order()
        self._ref_count = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.on_change: OnChange | None = None

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached) + len(self._near)

    @property
    def num_usable(self) -> int:
        """Blocks in the pool, in whatever state."""
        return self.num_blocks - self.first

    @property
    def num_free(self) -> int:
        """Blocks without content: `allocate` hands them out before it evicts anything."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks without a holder whose content can be found."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks with a ref count of 1 or more."""
        return self.num_usable - self.num_available

    def ref_count(self, block: int) -> int:
        """How many holders `block` has."""
        return self._ref_count[block]

    def is_shared(self, block: int) -> bool:
        """Whether others hold `block` too, or can find it: then it must not be written to."""
        return self._ref_count[block] > 1 or block in self._hash_of

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks, evicting cached ones once no free one is left.

        Those of `hand_out_last` come after all others, the highest ones first.

        Raises:
            OutOfBlocksError: fewer than `n` are available; the pool is unchanged.
        """
        if n > self.num_available:
            raise OutOfBlocksError(f"asked for {n} blocks, {self.num_available} available")
        blocks = [self._next() for _ in range(n)]
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
        self._cached.hold(block)
        self._ref_count[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference. The last one leaves the block cached if published, else free."""
        assert self._ref_count[block] > 0, f"block {block} released more often than held"
        self._ref_count[block] -= 1
        if self._ref_count[block] == 0:
            if block >= self._last and block in self._hash_of:
                self._cached.admit(block)
            else:
                self._forget(block)
                self._become_free(block)

    def publish(self, block: int, key: bytes) -> None:
        """Make the complete content of held `block` findable by `key`.

        Where another block has that content already, that one stays the findable one.
        """
        assert self._ref_count[block] > 0, f"block {block} published but not held"
        if key not in self._block_of and block not in self._hash_of:
            self._block_of[key] = block
            self._hash_of[block] = key
            if self.on_change is not None:
                self.on_change(key, True)

    def unpublish(self, block: int) -> None:
        """Have held `block` found no more: it will be written to."""
        assert self._ref_count[block] > 0, f"block {block} unpublished but not held"
        self._forget(block)

    def discard(self, key: bytes) -> None:
        """Have content found no more, if there is any: a cached block that has it becomes free."""
        block = self._block_of.get(key)
        if block is not None:
            self._forget(block)
            if not self._ref_count[block]:
                self._become_free(block)

    def demote(self, key: bytes) -> None:
        """Evict a cached block first; one that is held or not there stays as it is."""
        block = self._block_of.get(key)
        if block is not None:
            self._cached.demote(block)

    def forget_cached(self) -> None:
        """Drop the content of every cached block; they become free."""
        while len(self._cached):
            self._free.append(self._evict())

    def hand_out_last(self, below: int) -> None:
        """Hand out blocks below id `below` only when no others are left, and cache none of them."""
        for block in [block for block in self._cached if block < below]:
            self._forget(block)
            self._free.append(block)
        free = sorted(self._near + self._free)
        self._last = below
        self._near = [block for block in free if block < below]
        self._free = [block for block in free if block >= below]

    def lend(self, below: int) -> bool:
        """Raise the boundary to block `below`.

        Only once all blocks on the way are free and are to be handed out last: False, and nothing
        changes, before that.
        """
        count = below - self.first
        if count and (len(self._near) < count or self._near[count - 1] != below - 1):
            return False
        del self._near[:count]
        self.first = below
        return True

    def take_back(self, first: int) -> None:
        """Lower the boundary to block `first`: those above it are free, and no others come last."""
        self._free[:0] = range(first, self.first)
        self.first = first
        self.hand_out_last(first)

    def _become_free(self, block: int) -> None:
        if block < self._last:
            insort(self._near, block)
        elif self._has_boundary:
            insort(self._free, block)
        else:
            self._free.append(block)

    def _next(self) -> int:
        if self._free:
            return self._free.pop()
        return self._evict() if len(self._cached) else self._near.pop()

    def _evict(self) -> int:
        block = self._cached.victim()
        assert block is not None
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            self._cached.remove(block)
            if self.on_change is not None:
                self.on_change(key, False)

    def all_keys(self) -> list[bytes]:
        """See `journal.Source`."""
        return list(self._block_of)

    def has(self, key: bytes) -> bool:
        """See `journal.Source`."""
        return key in self._block_of

    def check(self) -> None:
        """Assert the invariants of the class docstring."""
        free, cached = {*self._free, *self._near}, set(self._cached)
        held = {b for b, count in enumerate(self._ref_count) if count > 0}
        assert len(free) == len(self._free) + len(self._near), "a block is free twice"
        assert sorted(self._near) == self._near == [b for b in sorted(free) if b < self._last]
        assert all(b >= self._last for b in cached), "a block that comes last is cached"
        assert not free & cached, "a block is free and cached"
        assert not free & held and not cached & held, "a block is held and available"
        assert free | cached | held == set(range(self.first, self.num_blocks)), (
            "a block is in no state, or beyond the boundary in one"
        )
        assert all(count >= 0 for count in self._ref_count), "a ref count is negative"
        assert cached <= self._hash_of.keys(), "a cached block has no hash"
        assert not free & self._hash_of.keys(), "a free block has a hash"
        assert {b: k for k, b in self._block_of.items()} == self._hash_of, "hash maps differ"
