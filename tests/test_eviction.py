"""Orders of eviction against a plain list, and the names that find them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hotset.errors import ConfigError
from hotset.eviction import POLICIES, By, Order, Policy, policy_named

KEYS = st.integers(0, 5)


def filled(name: str) -> Order[str]:
    """An order to which a, b and c were admitted; a was used twice after that, and b once."""
    order: Order[str] = policy_named(name).order()
    for key in "abc":
        order.admit(key)
    for key in "aba":
        order.touch(key)
    return order


@pytest.mark.parametrize(
    ("name", "expected"), [("lru", "cba"), ("lfu", "cba"), ("lifo", "cba"), ("least-stale", "abc")]
)
def test_a_policy_evicts_in_its_order(name: str, expected: str) -> None:
    assert "".join(filled(name)) == expected
    order = filled(name)
    assert [order.victim() for _ in range(4)] == [*expected, None]


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_demoted_goes_first_and_what_is_spared_stays(name: str) -> None:
    order = filled(name)
    first, second, third = order
    order.demote(third)
    assert list(order) == [third, first, second]
    assert order.victim(lambda key: key == third) == first
    assert list(order) == [third, second]


def test_what_was_held_keeps_the_number_of_its_uses_and_what_was_removed_does_not() -> None:
    order = filled("lfu")
    for take_out in (order.hold, order.remove):
        take_out("a")
        assert "a" not in order and len(order) == 2
        order.admit("a")
        assert list(order) == (["c", "b", "a"] if take_out == order.hold else ["c", "a", "b"])


def test_a_policy_that_does_not_exist_is_told_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=f"'oldest'; expected one of {', '.join(POLICIES)}"):
        policy_named("oldest")


class OrderMachine(RuleBasedStateMachine):
    """Any policy against a sorted list of all keys and what is known of them."""

    @initialize(by=st.sampled_from(By), largest_first=st.booleans())
    def begin(self, by: By, largest_first: bool) -> None:
        self.by, self.sign = by, -1 if largest_first else 1
        self.order: Order[int] = Policy(by, largest_first).order()
        self.time = 0
        self.rank: dict[int, tuple[float, int]] = {}
        self.uses = dict.fromkeys(range(6), 0)

    def note(self, key: int, *, arrives: bool) -> None:
        self.time += 1
        self.uses[key] += 1
        if self.by is By.NUM_USES:
            self.rank[key] = (self.sign * self.uses[key], self.time)
        elif arrives or self.by is By.LAST_USE:
            self.rank[key] = (0, self.sign * self.time)

    @rule(key=KEYS)
    def admit(self, key: int) -> None:
        if key not in self.rank:
            self.order.admit(key)
            self.note(key, arrives=True)

    @rule(key=KEYS)
    def touch(self, key: int) -> None:
        self.order.touch(key)
        if key in self.rank:
            self.note(key, arrives=False)

    @rule(key=KEYS)
    def demote(self, key: int) -> None:
        self.order.demote(key)
        if key in self.rank:
            self.time += 1
            is_counted = self.by is By.NUM_USES
            self.rank[key] = (float("-inf"), self.time) if is_counted else (0, -self.time)

    @rule(key=KEYS)
    def hold(self, key: int) -> None:
        self.order.hold(key)
        self.rank.pop(key, None)

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        self.order.remove(key)
        self.rank.pop(key, None)
        self.uses[key] = 0

    @rule(spared=st.sets(KEYS, max_size=3))
    def victim(self, spared: set[int]) -> None:
        left = sorted((rank, key) for key, rank in self.rank.items() if key not in spared)
        victim = self.order.victim(lambda key: key in spared)
        assert victim == (left[0][1] if left else None)
        if victim is not None:
            del self.rank[victim]
            self.uses[victim] = 0

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "rank"):
            assert list(self.order) == sorted(self.rank, key=self.rank.__getitem__)
            assert len(self.order) == len(self.rank)
            assert all((key in self.order) == (key in self.rank) for key in range(6))


TestOrderMachine = OrderMachine.TestCase
TestOrderMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
