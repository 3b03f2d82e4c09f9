"""Which host slot holds which payload. Bookkeeping only: the memory itself is `arena.HostArena`.

Imports no torch.
"""

from collections import OrderedDict

from hotset.errors import OutOfBlocksError


class HostTier:
    """Keys of payloads in host memory slots. Each slot is in one state at a time.

    free    -- no content
    filling -- reserved for a key, its content on the way; never evicted
    ready   -- holds its key's payload; evicted least recently used first, unless pinned
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._filling: dict[bytes, int] = {}
        self._ready: OrderedDict[bytes, int] = OrderedDict()  # unpinned, oldest first
        self._pinned: dict[bytes, tuple[int, int]] = {}  # key -> (slot, pins)

    def grow(self, num_slots: int) -> None:
        """There is memory for `num_slots` now, at least as many as before."""
        self._free[:0] = range(num_slots - 1, self.num_slots - 1, -1)
        self.num_slots = num_slots

    @property
    def num_used(self) -> int:
        """Slots that hold a payload or wait for one."""
        return self.num_slots - len(self._free)

    @property
    def num_evictable(self) -> int:
        """Slots that `reserve` can hand out: free ones, and ready ones without a pin."""
        return len(self._free) + len(self._ready)

    def states(self) -> str:
        """One letter per slot: free, arriving (filling), held (pinned) or cached (ready)."""
        letters = ["f"] * self.num_slots
        for slot in self._filling.values():
            letters[slot] = "a"
        for slot in self._ready.values():
            letters[slot] = "c"
        for slot, _ in self._pinned.values():
            letters[slot] = "h"
        return "".join(letters)

    def is_filling(self, key: bytes) -> bool:
        """Whether the payload of `key` is on its way into a slot."""
        return key in self._filling

    def is_ready(self, key: bytes) -> bool:
        """Whether the payload of `key` can be read now."""
        return key in self._ready or key in self._pinned

    def is_in_use(self, key: bytes) -> bool:
        """Whether the slot of `key` is being filled or read."""
        return key in self._filling or key in self._pinned

    def reserve(self, key: bytes) -> int:
        """Take a slot for `key`, evicting the least recently used unpinned payload if needed.

        Raises:
            OutOfBlocksError: every slot is filling or pinned; nothing changed.
        """
        assert not self.is_filling(key) and not self.is_ready(key), "key has a slot already"
        if self._free:
            slot = self._free.pop()
        elif self._ready:
            _, slot = self._ready.popitem(last=False)
        else:
            raise OutOfBlocksError(f"all {self.num_slots} host slots are in use by transfers")
        self._filling[key] = slot
        return slot

    def commit(self, key: bytes) -> None:
        """The payload of a filling `key` has come: it is ready."""
        self._ready[key] = self._filling.pop(key)

    def abandon(self, key: bytes) -> None:
        """The payload of a filling `key` will not come: its slot is free."""
        self._free.append(self._filling.pop(key))

    def slot_of(self, key: bytes) -> int:
        """The slot of a filling or pinned `key`."""
        return self._filling[key] if key in self._filling else self._pinned[key][0]

    def filling_keys(self) -> set[bytes]:
        """Keys whose payload is on its way into a slot."""
        return set(self._filling)

    def pin(self, key: bytes) -> int:
        """Protect a ready payload while it is read; returns its slot."""
        if key in self._pinned:
            slot, pins = self._pinned[key]
        else:
            slot, pins = self._ready.pop(key), 0
        self._pinned[key] = (slot, pins + 1)
        return slot

    def unpin(self, key: bytes) -> None:
        """Undo one `pin`. A payload without a pin becomes the most recently used one."""
        slot, pins = self._pinned.pop(key)
        if pins > 1:
            self._pinned[key] = (slot, pins - 1)
        else:
            self._ready[key] = slot

    def demote(self, key: bytes) -> None:
        """Make a ready payload without a pin the next one to be evicted."""
        if key in self._ready:
            self._ready.move_to_end(key, last=False)

    def touch(self, key: bytes) -> None:
        """Make a ready payload the most recently used one."""
        if key in self._ready:
            self._ready.move_to_end(key)

    def discard(self, key: bytes) -> None:
        """Drop a ready payload without a pin; another state is left as it is."""
        slot = self._ready.pop(key, None)
        if slot is not None:
            self._free.append(slot)

    def check(self) -> None:
        """Assert that each slot is in exactly one state."""
        slots = [
            *self._free,
            *self._filling.values(),
            *self._ready.values(),
            *(slot for slot, _ in self._pinned.values()),
        ]
        assert sorted(slots) == list(range(self.num_slots)), "a slot is in no state or in two"
        assert not self._filling.keys() & (self._ready.keys() | self._pinned.keys())
        assert not self._ready.keys() & self._pinned.keys()
        assert all(pins > 0 for _, pins in self._pinned.values())
