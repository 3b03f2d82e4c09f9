"""Who is evicted first: policies by name, for KV blocks and for experts. Imports no torch.

A policy is one row of `POLICIES`. Blocks and payloads are kept in its `order`, one by one; expert
slots on a device are ranked all at once in tensors, by the same row.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import Any, Generic, Protocol, TypeVar

from hotset.errors import ConfigError

K = TypeVar("K", bound=Hashable)


class Order(Protocol[K]):
    """The keys that may be evicted, in the order in which they go.

    `admit` puts a key in. It leaves by `hold` while it is in use, or for good by `remove` and
    `victim`. The other methods leave a key that is not in the order as it is.
    """

    def admit(self, key: K) -> None:
        """Let a key be evicted from here on: its content came, or its last user has left."""
        ...

    def hold(self, key: K) -> None:
        """Take a key out until it is admitted again, and remember how it was used."""
        ...

    def touch(self, key: K) -> None:
        """Note that a key was used."""
        ...

    def demote(self, key: K) -> None:
        """Make a key the next one to go."""
        ...

    def remove(self, key: K) -> None:
        """Take a key out and forget it."""
        ...

    def victim(self, is_spared: Callable[[K], bool] | None = None) -> K | None:
        """Take out the first key that is not spared; None where there is none."""
        ...

    def __contains__(self, key: object) -> bool:
        """Whether a key may be evicted."""
        ...

    def __iter__(self) -> Iterator[K]:
        """The keys, the first to go in front. Nothing may change meanwhile."""
        ...

    def __len__(self) -> int:
        """How many keys may be evicted."""
        ...


class By(Enum):
    """What decides who goes first."""

    LAST_USE = "last use"
    NUM_USES = "number of uses"
    ARRIVAL = "arrival"


@dataclass(frozen=True, slots=True)
class Policy:
    """Evicts by one number per key, the smallest first.

    Attributes:
        by: the number.
        largest_first: reverses that.
        spares_current: what the current step has used goes after all others. Experts only: a
            block that a step uses is held anyway.
    """

    by: By
    largest_first: bool = False
    spares_current: bool = False

    def order(self) -> "Order[Any]":
        """An empty order by this policy."""
        if self.by is By.NUM_USES:
            return _CountedOrder(largest_first=self.largest_first)
        return _ListOrder(moves=self.by is By.LAST_USE, largest_first=self.largest_first)


# Source of least-stale: "SpecMD" (its least-stale eviction). Expert slots belong to one layer here,
# so all of a layer's experts are equally far ahead in the scan over layers, and the step decides
# alone.
POLICIES = {
    "least-stale": Policy(By.ARRIVAL, spares_current=True),
    "lru": Policy(By.LAST_USE),
    "lfu": Policy(By.NUM_USES),
    "lifo": Policy(By.ARRIVAL, largest_first=True),
}


def policy_named(name: str) -> Policy:
    """The policy of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"eviction policy {name!r}; expected one of {', '.join(POLICIES)}")
    return POLICIES[name]


class _ListOrder(Generic[K]):
    """By arrival or by last use, in constant time. To be admitted again is to arrive again."""

    def __init__(self, *, moves: bool, largest_first: bool) -> None:
        self._keys: OrderedDict[K, None] = OrderedDict()
        self._moves = moves
        self._largest_first = largest_first

    def admit(self, key: K) -> None:
        self._keys[key] = None

    def hold(self, key: K) -> None:
        self._keys.pop(key, None)

    remove = hold

    def touch(self, key: K) -> None:
        if self._moves and key in self._keys:
            self._keys.move_to_end(key)

    def demote(self, key: K) -> None:
        if key in self._keys:
            self._keys.move_to_end(key, last=self._largest_first)

    def victim(self, is_spared: Callable[[K], bool] | None = None) -> K | None:
        if is_spared is None:  # as each block that a step takes asks for one
            return self._keys.popitem(last=self._largest_first)[0] if self._keys else None
        key = next((key for key in self if not is_spared(key)), None)
        if key is not None:
            del self._keys[key]
        return key

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[K]:
        return reversed(self._keys) if self._largest_first else iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _CountedOrder(Generic[K]):
    """By number of uses; of equal ones the first that was admitted. A heap whose old entries stay.

    To be admitted is a use, too.
    """

    def __init__(self, *, largest_first: bool) -> None:
        self._sign = -1 if largest_first else 1
        self._num_uses: Counter[K] = Counter()
        self._rank: dict[K, tuple[float, int]] = {}  # of keys that may be evicted
        self._heap: list[tuple[float, int, K]] = []  # those whose rank is not the key's are old
        self._next = 0

    def admit(self, key: K) -> None:
        self._num_uses[key] += 1
        self._push(key, self._sign * self._num_uses[key])

    def hold(self, key: K) -> None:
        self._rank.pop(key, None)

    def touch(self, key: K) -> None:
        if key in self._rank:
            self.admit(key)

    def demote(self, key: K) -> None:
        if key in self._rank:
            self._push(key, -math.inf)

    def remove(self, key: K) -> None:
        self.hold(key)
        self._num_uses.pop(key, None)

    def victim(self, is_spared: Callable[[K], bool] | None = None) -> K | None:
        passed, found = [], None
        while self._heap and found is None:
            *rank, key = entry = heappop(self._heap)
            if self._rank.get(key) != tuple(rank):
                continue
            if is_spared is not None and is_spared(key):
                passed.append(entry)
            else:
                found = key
                self.remove(key)
        for entry in passed:
            heappush(self._heap, entry)
        return found

    def __contains__(self, key: object) -> bool:
        return key in self._rank

    def __iter__(self) -> Iterator[K]:
        return iter(sorted(self._rank, key=self._rank.__getitem__))

    def __len__(self) -> int:
        return len(self._rank)

    def _push(self, key: K, rank: float) -> None:
        self._rank[key] = (rank, self._next)
        heappush(self._heap, (rank, self._next, key))
        self._next += 1
        if len(self._heap) > 2 * len(self._rank) + 64:  # mostly old ones
            self._heap = [(*rank, key) for key, rank in self._rank.items()]
            heapify(self._heap)
