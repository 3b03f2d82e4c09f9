"""Which blocks a replica has in which tiers, by its journal: how long a prefix it would find."""

import threading
from collections.abc import Sequence
from itertools import islice

from hotset.memory.journal import TIERS, JournalPart, rows_of

# Blocks before the end that is found that are looked at too: tails leave a tier before heads, but
# not always.
_NEIGHBOURS = 4
_MOST_GUESSED = 2**18  # keys


BITS = {name: 1 << number for number, name in enumerate(TIERS)}
"""Tiers by name, as `ReplicaIndex` takes them; they add up."""


class ReplicaIndex:
    """Follows the journal of one replica.

    It is a hint: the replica itself looks for each block, and what is wrong here costs a
    recomputation. Until the first snapshot has come, and after changes were lost until the next
    one has, it is a guess: what was known before, with what was sent there since (`guess`).

    Any thread may call it.

    Attributes:
        is_exact: whether it says what the replica said last.
    """

    def __init__(self) -> None:
        self.is_exact = False
        self._tiers: dict[bytes, int] = {}  # of a key, one bit per tier
        self._coming: dict[bytes, int] | None = None  # of a snapshot that is not whole yet
        self._next: int | None = None  # number of the change that comes next
        self._lock = threading.Lock()  # to change these; a look takes none

    def __len__(self) -> int:
        """Keys that are known."""
        return len(self._tiers)

    def take(self, part: JournalPart) -> bool:
        """Take in the next part; returns whether changes were lost: ask for a snapshot then.

        Raises:
            ValueError: the part is no journal's; nothing changed.
        """
        changes = list(rows_of(part.changes))
        content = None if part.content is None else list(rows_of(part.content))
        with self._lock:
            is_lost = self._next is not None and part.first != self._next
            self._next = part.next
            if is_lost:
                self.is_exact, self._coming = False, None
            for tiers in (self._tiers, self._coming):
                if tiers is not None:
                    _change(tiers, changes)
            if content is not None and not self.is_exact:
                if part.begins:
                    self._coming = {}
                if self._coming is not None:
                    _change(self._coming, content)
                    if part.ends:
                        self._tiers, self._coming, self.is_exact = self._coming, None, True
        return is_lost

    def doubt(self) -> None:
        """Take what is known for a guess, until the next snapshot."""
        self.is_exact = False

    def guess(self, keys: Sequence[bytes]) -> None:
        """Blocks with these keys were sent to be computed. Where this is exact, nothing happens."""
        with self._lock:
            if self.is_exact:
                return
            if len(self._tiers) > _MOST_GUESSED:  # the older half is forgotten
                self._tiers = dict(islice(self._tiers.items(), _MOST_GUESSED // 2, None))
            for key in keys:
                self._tiers[key] = self._tiers.get(key, 0) | BITS[TIERS[0]]

    def prefix(self, keys: Sequence[bytes], bits: int, *, first: int = 0) -> int:
        """How many of the leading `keys` are in one of the tiers of `bits`, by bisection.

        The first `first` are known to be.
        """
        tiers = self._tiers
        low, high = first, len(keys) + 1  # keys[low - 1] is there, keys[high - 1] is not
        if first == len(keys) or not tiers.get(keys[first], 0) & bits:
            return first
        while high - low > 1:
            middle = (low + high) // 2
            if tiers.get(keys[middle - 1], 0) & bits:
                low = middle
            else:
                high = middle
        for number in range(max(first, low - 1 - _NEIGHBOURS), low - 1):
            if not tiers.get(keys[number], 0) & bits:
                return number
        return low

    def tiers_of(self, key: bytes) -> int:
        """The tiers that have a key, one bit each."""
        return self._tiers.get(key, 0)


def _change(tiers: dict[bytes, int], rows: Sequence[tuple[bytes, int, bool]]) -> None:
    for key, tier, is_there in rows:
        bits = tiers.get(key, 0)
        if is_there:
            tiers[key] = bits | 1 << tier
        elif left := bits & ~(1 << tier):
            tiers[key] = left
        else:
            tiers.pop(key, None)
