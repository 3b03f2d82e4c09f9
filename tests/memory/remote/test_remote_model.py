"""A store, a dictionary and the remote tier agree, whatever happens in between."""

import itertools
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from stores import FakeStore, answer, content, key, read, remote, seal, until, write

from hotset.memory.tier import Answer, CompletionStatus

KEYS = st.integers(0, 5)


class RemoteMachine(RuleBasedStateMachine):
    """Two tiers over one store. `stored` says which content is whole in it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = FakeStore(Path(self.folder.name))
        self.tiers = [remote(self.store.url), remote(self.store.url, by=seal(writer="other"))]
        self.store.values.clear()
        self.stored: set[int] = set()
        self.others = itertools.count(6)

    @invariant()
    def is_asked(self) -> None:
        """Forged payloads in a row would have a store left alone."""
        for tier in self.tiers:
            for store in tier._stores():
                store.breaker.answered()

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.close()
        self.store.close()
        self.folder.cleanup()

    def name(self, number: int) -> bytes:
        return seal().names([key(number)])[0]

    @rule(number=KEYS, which=st.booleans())
    def write(self, number: int, which: bool) -> None:
        tier = self.tiers[which]
        transfer_id = tier.submit_write(key(number), memoryview(content(number)), must=True)
        if transfer_id is None:  # the tier thinks that it is there
            assert tier.lookup([key(number)]) == [Answer.HIT]
            return
        while not any(one.transfer_id == transfer_id for one in tier.poll()):
            tier.wait(0.05)
        self.stored.add(number)

    @rule(number=KEYS, which=st.booleans())
    def read(self, number: int, which: bool) -> None:
        completion, found = read(self.tiers[which], number)
        assert (completion.status is CompletionStatus.OK) == (number in self.stored)
        if number in self.stored:
            assert found == content(number)
        else:
            assert answer(self.tiers[which], number) is Answer.MISS
            until(lambda: self.name(number) not in self.store.values)  # what is wrong is deleted

    @rule(number=KEYS, which=st.booleans())
    def ask(self, number: int, which: bool) -> None:
        tier = self.tiers[which]
        tier._known.pop(key(number), None)
        has = len(self.store.values.get(self.name(number), b"")) > 0
        assert (answer(tier, number) is Answer.HIT) == has

    @rule(number=KEYS)
    def evict(self, number: int) -> None:
        self.store.values.pop(self.name(number), None)
        self.stored.discard(number)

    @rule(number=KEYS, which=st.booleans())
    def discard(self, number: int, which: bool) -> None:
        tier = self.tiers[which]
        if tier.lookup([key(number)], may_ask=False) == [Answer.HIT]:
            self.stored.discard(number)
        tier.discard([key(number)])
        write(tier, next(self.others))  # comes after it

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.stored)))
        value = bytearray(self.store.values[self.name(number)])
        value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(1, 255))
        self.store.values[self.name(number)] = bytes(value)
        self.stored.discard(number)

    @precondition(lambda self: len(self.stored) > 1)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        pair = st.lists(st.sampled_from(sorted(self.stored)), min_size=2, max_size=2, unique=True)
        one, two = map(self.name, numbers := data.draw(pair))
        values = self.store.values
        values[one], values[two] = values[two], values[one]
        self.stored -= set(numbers)


TestRemoteMachine = RemoteMachine.TestCase
TestRemoteMachine.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
