"""Host slots: random operations against a plain model."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hotset.errors import OutOfBlocksError
from hotset.eviction import policy_named
from hotset.memory.residency import Payload, Residency, State


def residency(num_slots: int) -> Residency:
    order = policy_named("lru").order()
    return Residency(num_slots, lambda key: order)


def stored(host: Residency, key: bytes) -> Payload:
    payload = host.reserve(key, State.SPILLING)
    host.become_ready(payload)
    return payload


def test_the_least_recently_used_payload_without_a_pin_goes_first() -> None:
    host = residency(3)
    for key in (b"a", b"b", b"c"):
        stored(host, key)
    host.touch(b"a")
    payload = host.get(b"b")
    assert payload is not None
    host.pin(payload)
    stored(host, b"d")
    assert host.get(b"c") is None and host.is_ready(b"a") and host.is_ready(b"b")
    host.unpin(payload)  # counts as a use
    stored(host, b"e")
    assert host.get(b"a") is None and host.is_ready(b"b")
    host.check()


def test_pins_of_a_payload_on_its_way_hold_it_once_it_is_there() -> None:
    host = residency(1)
    payload = host.reserve(b"a", State.READING)
    host.pin(payload)
    payload.wanted_by += [7, 8]
    assert host.states() == "a"
    assert host.become_ready(payload) == [7, 8] and payload.pins == 3
    assert host.states() == "h" and host.num_evictable == 0
    with pytest.raises(OutOfBlocksError, match="all 1 host slots are in use"):
        host.reserve(b"b", State.SPILLING)
    for _ in range(3):
        host.unpin(payload)
    assert host.states() == "c" and host.num_evictable == 1


@pytest.mark.parametrize("when", ["coming", "pinned", "idle"])
def test_a_dropped_payload_is_forgotten_once_its_last_user_has_left(when: str) -> None:
    host = residency(1)
    payload = host.reserve(b"a", State.SPILLING)
    if when == "coming":
        host.drop(payload)
        assert host.num_used == 1
        host.become_ready(payload)
    else:
        host.become_ready(payload)
        host.pin(payload)
        if when == "pinned":
            host.drop(payload)
            assert host.is_ready(b"a")
        host.unpin(payload)
        if when == "idle":
            host.drop(payload)
    assert host.num_used == 0 and host.states() == "f"
    host.check()


def test_slots_that_become_ready_later_are_used_after_those_before_them() -> None:
    host = residency(0)
    host.grow(2)
    first = host.reserve(b"a", State.SPILLING)
    host.grow(4)
    assert [first.slot, *(host.reserve(k, State.READING).slot for k in (b"b", b"c"))] == [0, 1, 2]
    host.check()


class ResidencyMachine(RuleBasedStateMachine):
    """The records of four slots against a dictionary of slots and a list in order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.host = residency(4)
        self.slots: dict[bytes, int] = {}
        self.idle: list[bytes] = []  # may be evicted, the first one first
        self.keys = itertools.count()

    def record(self, data: st.DataObject) -> Payload:
        payload = self.host.get(data.draw(st.sampled_from(sorted(self.slots))))
        assert payload is not None
        return payload

    def settle(self, payload: Payload) -> None:
        """Note what becomes of a ready payload whose pins or drops have changed."""
        if payload.pins == 0 and payload.is_dropped:
            del self.slots[payload.key]
            self.idle = [key for key in self.idle if key != payload.key]
        elif payload.pins == 0:
            self.idle.append(payload.key)

    @rule(state=st.sampled_from([State.SPILLING, State.READING]))
    def reserve(self, state: State) -> None:
        key = next(self.keys).to_bytes(4, "big")
        if len(self.slots) == 4:
            if not self.idle:
                with pytest.raises(OutOfBlocksError, match="in use by transfers"):
                    self.host.reserve(key, state)
                return
            del self.slots[self.idle.pop(0)]
        slot = self.host.reserve(key, state).slot
        assert slot not in self.slots.values()
        self.slots[key] = slot

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), num_blocks=st.integers(0, 2))
    def end(self, data: st.DataObject, num_blocks: int) -> None:
        """The content of a payload comes, or will not come."""
        payload = self.record(data)
        if payload.is_ready:
            return
        if payload.pins == 0 and data.draw(st.booleans()):
            self.host.abandon(payload)
            del self.slots[payload.key]
            return
        payload.wanted_by += range(num_blocks)
        pins = payload.pins + num_blocks
        assert self.host.become_ready(payload) == list(range(num_blocks))
        assert payload.pins == pins
        self.settle(payload)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        payload = self.record(data)
        self.host.pin(payload)
        self.idle = [key for key in self.idle if key != payload.key]

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        payload = self.record(data)
        if payload.pins:
            self.host.unpin(payload)
            if payload.is_ready:
                self.settle(payload)

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), how=st.sampled_from(["touch", "demote", "discard", "drop"]))
    def change(self, data: st.DataObject, how: str) -> None:
        payload = self.record(data)
        key, is_idle = payload.key, payload.key in self.idle
        if how == "drop":
            self.host.drop(payload)
        else:
            getattr(self.host, how)(key)  # no effect on one that is in use
        if is_idle:
            self.idle.remove(key)
            if how in ("drop", "discard"):
                del self.slots[key]
            else:
                self.idle.insert(len(self.idle) if how == "touch" else 0, key)

    @invariant()
    def agrees(self) -> None:
        self.host.check()
        assert self.host.num_used == len(self.slots)
        assert self.host.num_evictable == 4 - len(self.slots) + len(self.idle)
        for key, slot in self.slots.items():
            payload = self.host.get(key)
            assert payload is not None and payload.slot == slot
            assert payload.is_in_use == (key not in self.idle)


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
