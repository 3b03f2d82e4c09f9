"""Which tenant's request is next. Imports no torch."""

from bisect import insort
from collections.abc import Iterator
from typing import Generic, TypeVar

from hotset.engine.urgency import SLACK

T = TypeVar("T")

_PROMPT_WEIGHT = 1
_OUTPUT_WEIGHT = 2


class FairQueue(Generic[T]):
    """Waiting items by priority, then by the least served tenant, then by when each is due.

    An item is due once its tenant was served `SLACK` times its size since it came: equal ones go
    first come, first served, and a much shorter one overtakes.

    Each tenant has a counter of the tokens it was served, and the one with the least goes next.
    A tenant that comes back is lifted to the least of those that wait, so that idle time earns
    no credit; one that floods the queue delays itself only.

    Source: the Virtual Token Counter of Sheng et al., Fairness in Serving Large Language Models
    (OSDI 2024), algorithm 2, with its weights.
    """

    def __init__(self) -> None:
        # When each item is due, and it; none is empty.
        self._queues: dict[tuple[int, str], list[tuple[int, T]]] = {}
        self._served: dict[str, int] = {}
        self._last_served = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for queue in self._queues.values():
            yield from (item for _, item in queue)

    def push(self, tenant: str, priority: int, item: T, *, size: int = 0) -> None:
        """Queue an item of `size` tokens; a lower priority goes first."""
        waiting = {name for _, name in self._queues}
        if tenant not in waiting:
            least = min((self._served[name] for name in waiting), default=self._last_served)
            self._served[tenant] = max(self._served.get(tenant, 0), least)
        queue = self._queues.setdefault((priority, tenant), [])
        insort(queue, (self._served[tenant] + SLACK * size, item), key=lambda entry: entry[0])
        self._length += 1

    def peek(self) -> T:
        """The next item. Raises IndexError where there is none."""
        return self._queues[self._next_key()][0][1]

    def pop(self) -> T:
        """Take the next item. Raises IndexError where there is none."""
        key = self._next_key()
        queue = self._queues[key]
        _, item = queue.pop(0)
        if not queue:
            del self._queues[key]
        self._last_served = self._served[key[1]]
        self._length -= 1
        return item

    def remove(self, tenant: str, priority: int, item: T) -> bool:
        """Take an item out; returns whether it was there."""
        queue = self._queues.get((priority, tenant))
        index = next((i for i, (_, one) in enumerate(queue or ()) if one == item), None)
        if queue is None or index is None:
            return False
        del queue[index]
        if not queue:
            del self._queues[priority, tenant]
        self._length -= 1
        return True

    def _next_key(self) -> tuple[int, str]:
        if not self._queues:
            raise IndexError("the queue is empty")
        return min(self._queues, key=lambda key: (key[0], self._served[key[1]]))

    def charge(self, tenant: str, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Count what a tenant was served."""
        tokens = _PROMPT_WEIGHT * prompt_tokens + _OUTPUT_WEIGHT * output_tokens
        self._served[tenant] = self._served.get(tenant, 0) + tokens
