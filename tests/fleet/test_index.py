"""An index against the tiers that it follows: random journals with gaps, snapshots and restarts."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hotset.errors import OutOfBlocksError
from hotset.eviction import policy_named
from hotset.fleet import index as module
from hotset.fleet.index import BITS, ReplicaIndex
from hotset.kv.pool import BlockPool
from hotset.memory import journal
from hotset.memory.journal import TIERS, Journal, JournalPart, OnChange, Source
from hotset.memory.residency import Residency, State

DEVICE, HOST, DISK = (BITS[name] for name in ("device", "host", "disk"))
NUMBERS = st.integers(0, 11)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Shelf:
    """A tier as a journal sees it, such as a disk."""

    def __init__(self) -> None:
        self.stored: dict[bytes, None] = {}
        self.on_change: OnChange | None = None

    def put(self, key: bytes, *, is_there: bool) -> None:
        if (key in self.stored) != is_there:
            self.stored = {**self.stored, key: None} if is_there else self.stored
            if not is_there:
                del self.stored[key]
            if self.on_change is not None:
                self.on_change(key, is_there)

    def all_keys(self) -> list[bytes]:
        return list(self.stored)

    def has(self, key: bytes) -> bool:
        return key in self.stored


class IndexMachine(RuleBasedStateMachine):
    """A pool, host slots and a disk that change; parts of their journal that wait or get lost."""

    @initialize()
    def start(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(journal, "_MOST_CONTENT", 3)
        self.patch.setattr(journal, "_MOST_CHANGES", 6)
        self.disk = Shelf()
        self.restart()

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule()
    def restart(self) -> None:
        """What is on disk stays; the link is a new one."""
        order = policy_named("lru").order()
        self.pool, self.host = BlockPool(5), Residency(4, lambda key: order)
        self.held: list[int] = []
        sources: dict[str, Source] = {"device": self.pool, "host": self.host, "disk": self.disk}
        self.disk.on_change = None
        self.journal, self.index = Journal(sources), ReplicaIndex()
        self.parts: deque[JournalPart] = deque()
        self.journal.follow(True)

    @rule(number=NUMBERS)
    def compute(self, number: int) -> None:
        try:
            [block] = self.pool.allocate(1)
        except OutOfBlocksError:
            return
        self.pool.publish(block, key(number))
        self.held.append(block)

    @rule()
    def release(self) -> None:
        if self.held:
            self.pool.release(self.held.pop(0))

    @rule(number=NUMBERS)
    def discard(self, number: int) -> None:
        self.pool.discard(key(number))
        if (payload := self.host.get(key(number))) is not None:
            self.host.drop(payload)

    @rule(number=NUMBERS, private=st.booleans(), coming=st.booleans())
    def spill(self, number: int, private: bool, coming: bool) -> None:
        if self.host.get(key(number)) is not None:
            return
        try:
            payload = self.host.reserve(key(number), State.SPILLING)
        except OutOfBlocksError:
            return
        payload.slowest = 0 if private else None
        if not coming:
            self.host.become_ready(payload)

    @rule(number=NUMBERS, is_good=st.booleans())
    def arrive(self, number: int, is_good: bool) -> None:
        payload = self.host.get(key(number))
        if payload is not None and not payload.is_ready:
            if is_good:
                self.host.become_ready(payload)
            else:
                self.host.abandon(payload)

    @rule(number=NUMBERS, is_there=st.booleans())
    def write(self, number: int, is_there: bool) -> None:
        self.disk.put(key(number), is_there=is_there)

    @rule()
    def report(self) -> None:
        if (part := self.journal.take()) is not None:
            self.parts.append(part)

    @rule()
    def deliver(self) -> None:
        if self.parts and self.index.take(self.parts.popleft()):
            self.journal.follow(True)

    @rule()
    def lose(self) -> None:
        if self.parts:
            self.parts.popleft()

    @rule()
    def another_follower_asks(self) -> None:
        self.journal.follow(True)

    @rule(numbers=st.lists(NUMBERS))
    def guess(self, numbers: list[int]) -> None:
        self.index.guess([key(number) for number in numbers])

    @rule(number=NUMBERS)
    def quiet(self, number: int) -> None:
        # A loss is seen by the next part; a snapshot whose first part was lost is asked for again.
        self.disk.put(key(number), is_there=not self.disk.has(key(number)))
        for _ in range(2):
            while self.journal.has_news or self.parts:
                self.report()
                self.deliver()
            if not self.index.is_exact:
                self.journal.follow(True)
        assert self.index.is_exact
        sources = (self.pool, self.host, self.disk)
        there = [
            {k for k in map(key, range(12)) if source.has(k)} == set(source.all_keys())
            for source in sources
        ]
        assert all(there)
        for one in map(key, range(12)):
            bits = sum(1 << number for number, source in enumerate(sources) if source.has(one))
            assert self.index.tiers_of(one) == bits
        assert len(self.index) == len(set().union(*(source.all_keys() for source in sources)))

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            self.host.check()


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def snapshot(tiers: dict[int, int]) -> JournalPart:
    """Of keys by number, with the bits of their tiers."""
    rows = b"".join(
        key(number) + bytes([2 * tier + 1])
        for number, bits in tiers.items()
        for tier in range(len(TIERS))
        if bits >> tier & 1
    )
    return JournalPart(0, b"", rows, begins=True, ends=True)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_prefix_is_as_long_as_its_blocks_are_there_in_one_of_the_tiers(
    num_keys: int, on_device: int, in_host: int
) -> None:
    index = ReplicaIndex()
    tiers = {n: DEVICE * (n < on_device) | HOST * (n < in_host) for n in range(40)}
    index.take(snapshot({n: bits for n, bits in tiers.items() if bits}))
    keys = [key(n) for n in range(num_keys)]
    first = index.prefix(keys, DEVICE)
    assert first == min(num_keys, on_device)
    assert index.prefix(keys, DEVICE | HOST, first=first) == min(num_keys, max(on_device, in_host))
    assert index.prefix(keys, DISK) == 0


def test_a_hole_near_the_end_ends_the_prefix() -> None:
    index = ReplicaIndex()
    index.take(snapshot({n: DEVICE for n in range(20) if n != 17}))
    assert index.prefix([key(n) for n in range(25)], DEVICE) == 17


def test_guesses_are_bounded_and_end_with_the_first_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST_GUESSED", 10)
    index = ReplicaIndex()
    for start in range(0, 30, 5):
        index.guess([key(n) for n in range(start, start + 5)])
    assert len(index) <= 15 and index.prefix([key(n) for n in range(25, 35)], DEVICE) == 5
    assert not index.take(snapshot({3: HOST}))
    assert index.is_exact and len(index) == 1
    index.guess([key(7)])
    assert len(index) == 1


def test_a_part_that_makes_no_sense_changes_nothing() -> None:
    index = ReplicaIndex()
    index.take(snapshot({3: HOST}))
    with pytest.raises(ValueError, match="a journal has 3 bytes"):
        index.take(JournalPart(5, key(4) + b"\x01", b"abc"))
    assert index.is_exact and len(index) == 1
    assert not index.take(JournalPart(0, key(4) + b"\x01")) and len(index) == 2
