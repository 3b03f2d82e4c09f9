"""Which slot of host memory holds which payload: one record per key. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from hotset.errors import OutOfBlocksError
from hotset.eviction import Order
from hotset.memory.journal import OnChange


class State(Enum):
    """What is in the slot of a payload."""

    SPILLING = "spilling"  # on its way from the device
    READING = "reading"  # on its way from a slower tier
    LATE = "late"  # as READING, past its deadline: as good as not there
    READY = "ready"  # whole; evicted as the policy says, unless pinned


@dataclass(eq=False, slots=True)
class Payload:
    """The record of one key.

    Attributes:
        slot: its own as long as the record is.
        pins: of its readers: copies, writes to slower tiers, and `TierStack.keep`. Of one that is
            on its way, those to come.
        source: READING and LATE: the number of the tier that it comes from.
        wanted_by: device blocks to copy it to once it is READY.
        slowest: the number of the slowest tier that it may go to, 0 being host memory; None is
            all.
        is_dropped: forgotten once it is READY and not pinned.
    """

    key: bytes
    slot: int
    state: State
    pins: int = 0
    source: int = 0
    wanted_by: list[int] = field(default_factory=list)
    slowest: int | None = None
    is_dropped: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it can be read now."""
        return self.state is State.READY

    @property
    def is_in_use(self) -> bool:
        """Whether its slot is being filled, or read."""
        return self.pins > 0 or not self.is_ready

    @property
    def is_findable(self) -> bool:
        """Whether other requests may find it: it is there, and not of one request alone."""
        return self.is_ready and not self.is_dropped and self.slowest != 0


class Residency:
    """Payloads in slots. Each slot is free, of one payload, or detached; READY ones are evicted.

    Args:
        num_slots: at first.
        order_of: of a key, the order that says when its payload goes: one for all, or one for each
            group of keys. Empty at first.

    Attributes:
        on_change: see `journal.Source`.
    """

    def __init__(self, num_slots: int, order_of: Callable[[bytes], Order[bytes]]) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._payloads: dict[bytes, Payload] = {}
        self._detached: set[int] = set()
        self._order_of = order_of
        self._num_idle = 0
        self.on_change: OnChange | None = None

    def grow(self, num_slots: int) -> None:
        """There is memory for `num_slots` now, at least as many as before."""
        self._free[:0] = range(num_slots - 1, self.num_slots - 1, -1)
        self.num_slots = num_slots

    @property
    def num_used(self) -> int:
        """Slots that hold a payload or wait for one."""
        return len(self._payloads)

    @property
    def num_evictable(self) -> int:
        """Slots that can be had: free ones, and those of READY payloads without a pin."""
        return len(self._free) + self._num_idle

    @property
    def num_free(self) -> int:
        """Slots without a payload."""
        return len(self._free)

    def states(self) -> str:
        """One letter per slot: free, arriving, held (pinned) or cached."""
        letters = ["f"] * self.num_slots
        for payload in self._payloads.values():
            letters[payload.slot] = (
                "a" if not payload.is_ready else "h" if payload.pins > 0 else "c"
            )
        return "".join(letters)

    def get(self, key: bytes) -> Payload | None:
        """The record of a key; None where it has no slot."""
        return self._payloads.get(key)

    def is_ready(self, key: bytes) -> bool:
        """Whether the payload of a key can be read now."""
        payload = self._payloads.get(key)
        return payload is not None and payload.is_ready

    def reserve(self, key: bytes, state: State) -> Payload:
        """Take a slot for a key that has none, evicting one of its group where no slot is free.

        Raises:
            OutOfBlocksError: every payload is on its way or pinned; nothing changed.
        """
        assert key not in self._payloads, "key has a slot already"
        if not self._free:
            victim = self.victim(key)
            if victim is None:
                raise OutOfBlocksError(f"all {self.num_slots} host slots are in use by transfers")
            self._free_slot(victim)
        payload = self._payloads[key] = Payload(key, self._free.pop(), state)
        return payload

    def become_ready(self, payload: Payload) -> list[int]:
        """The content has come. Returns the blocks that wanted it, with a pin for each."""
        blocks, payload.wanted_by = payload.wanted_by, []
        payload.state = State.READY
        payload.pins += len(blocks)
        self._settle(payload)
        if self.on_change is not None and payload.is_findable:
            self.on_change(payload.key, True)
        return blocks

    def abandon(self, payload: Payload) -> list[int]:
        """The content will not come: the slot is free. Returns the blocks that wanted it."""
        assert not payload.is_ready
        self._free_slot(payload)
        return payload.wanted_by

    def pin(self, payload: Payload) -> None:
        """Protect a payload, there or on its way."""
        payload.pins += 1
        self._withdraw(payload.key)

    def unpin(self, payload: Payload) -> None:
        """Undo one `pin`. A READY payload that is not pinned any more counts as just used."""
        assert payload.pins > 0, "unpinned more often than pinned"
        payload.pins -= 1
        if payload.is_ready:
            self._settle(payload)

    def demote(self, key: bytes) -> None:
        """Make a payload that may be evicted the next one to be."""
        self._order_of(key).demote(key)

    def touch(self, key: bytes) -> None:
        """Note that a payload that may be evicted was used."""
        self._order_of(key).touch(key)

    def drop(self, payload: Payload) -> None:
        """Forget a payload, at once or as soon as it is not in use."""
        if self.on_change is not None and payload.is_findable:
            self.on_change(payload.key, False)
        payload.is_dropped = True
        if not payload.is_in_use:
            self._free_slot(payload)

    def discard(self, key: bytes) -> None:
        """Forget a payload that may be evicted; leave any other as it is."""
        if self.is_idle(key):
            self._free_slot(self._payloads[key])

    def is_idle(self, key: bytes) -> bool:
        """Whether the payload of a key is there and may be evicted."""
        return key in self._order_of(key)

    def victim(
        self, key: bytes, is_spared: Callable[[bytes], bool] = lambda key: False
    ) -> Payload | None:
        """The first to go of the group of `key`, pinned once; None where there is none.

        Forget it or unpin it.
        """
        victim = self._order_of(key).victim(is_spared)
        if victim is None:
            return None
        self._num_idle -= 1
        self._payloads[victim].pins += 1
        return self._payloads[victim]

    def forget(self, payload: Payload) -> None:
        """Free the slot of a READY payload that has no other pin."""
        assert payload.is_ready and payload.pins <= 1
        self._free_slot(payload)

    def detach(self, payload: Payload) -> int:
        """As `forget`, but the slot, which is returned, stays taken until it is given back."""
        self.forget(payload)
        self._detached.add(self._free.pop())
        return payload.slot

    def give_back(self, slot: int) -> None:
        """A detached slot is free."""
        self._detached.remove(slot)
        self._free.append(slot)

    def _settle(self, payload: Payload) -> None:
        if payload.pins == 0:
            if payload.is_dropped:
                self._free_slot(payload)
            else:
                self._order_of(payload.key).admit(payload.key)
                self._num_idle += 1

    def _withdraw(self, key: bytes) -> None:
        if self.is_idle(key):
            self._num_idle -= 1
            self._order_of(key).hold(key)

    def all_keys(self) -> list[bytes]:
        """See `journal.Source`."""
        return [key for key, payload in self._payloads.items() if payload.is_findable]

    def has(self, key: bytes) -> bool:
        """See `journal.Source`."""
        payload = self._payloads.get(key)
        return payload is not None and payload.is_findable

    def _free_slot(self, payload: Payload) -> None:
        if self.on_change is not None and payload.is_findable:
            self.on_change(payload.key, False)
        self._withdraw(payload.key)
        self._order_of(payload.key).remove(payload.key)
        del self._payloads[payload.key]
        self._free.append(payload.slot)

    def by_use(self) -> list[Payload]:
        """All payloads: those that are in use, then the others, the next to go last."""
        in_use = [payload for payload in self._payloads.values() if payload.is_in_use]
        orders = {id(order): order for order in map(self._order_of, self._payloads)}.values()
        idle = [self._payloads[key] for order in orders for key in order]
        return [*in_use, *reversed(idle)]

    def filling(self) -> set[bytes]:
        """Keys whose payload is on its way."""
        return {key for key, payload in self._payloads.items() if not payload.is_ready}

    def check(self) -> None:
        """Assert that each slot is free or of one payload, and that the order agrees."""
        payloads = self._payloads.values()
        slots = sorted([*self._free, *self._detached, *(payload.slot for payload in payloads)])
        assert slots == list(range(self.num_slots)), "a slot is in no state or in two"
        assert all(key == payload.key for key, payload in self._payloads.items())
        assert all(payload.pins >= 0 for payload in payloads)
        idle = {payload.key for payload in payloads if not payload.is_in_use}
        orders = {id(order): order for order in map(self._order_of, self._payloads)}.values()
        assert {key for order in orders for key in order} == idle, "the order is not of the idle"
        assert self._num_idle == len(idle)
        for payload in payloads:
            assert not (payload.is_ready and payload.wanted_by), "a fetch waits for what is there"
            assert payload.is_in_use or not payload.is_dropped, "a dropped payload is still there"
