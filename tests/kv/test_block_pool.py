import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hotset.errors import OutOfBlocksError
from hotset.kv.pool import BlockPool


def test_released_prefix_is_found_until_its_block_is_evicted() -> None:
    pool = BlockPool(num_blocks=1)
    [block] = pool.allocate(1)
    pool.publish(block, b"prefix")
    pool.release(block)

    assert pool.acquire(b"prefix") == block  # cached: a prefix hit
    pool.release(block)
    pool.allocate(1)  # takes the only block
    assert pool.acquire(b"prefix") is None


def test_allocation_beyond_what_is_available_changes_nothing() -> None:
    pool = BlockPool(num_blocks=3)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="asked for 2 blocks, 1 available"):
        pool.allocate(2)
    assert pool.num_available == 1
    pool.check()


def test_the_block_released_first_is_evicted_first() -> None:
    pool = BlockPool(num_blocks=2)
    old, new = pool.allocate(2)
    pool.publish(old, b"old")
    pool.publish(new, b"new")
    pool.release(old)
    pool.release(new)
    pool.allocate(1)
    assert pool.lookup(b"old") is None
    assert pool.lookup(b"new") == new


def test_of_two_blocks_with_one_content_the_first_stays_findable() -> None:
    pool = BlockPool(num_blocks=2)
    first, second = pool.allocate(2)
    pool.publish(first, b"same")
    pool.publish(second, b"same")
    pool.release(second)
    assert pool.lookup(b"same") == first
    assert pool.num_available == 1  # the second is free, not cached
    pool.check()


def test_the_boundary_waits_for_held_blocks_and_those_near_it_come_last() -> None:
    pool = BlockPool(num_blocks=6, first=1)
    blocks = pool.allocate(5)
    assert blocks == [5, 4, 3, 2, 1] and pool.num_usable == 5  # the highest come first
    for block in blocks[:-1]:
        pool.release(block)
    pool.hand_out_last(4)
    assert not pool.lend(2)
    assert sorted(pool.allocate(2)) == [4, 5]
    assert pool.allocate(1) == [3]  # better than to make anybody wait
    pool.release(3)
    pool.publish(1, b"near")
    pool.release(1)
    assert pool.lookup(b"near") is None
    assert pool.lend(3) and pool.first == 3 and pool.num_available == 1
    assert not pool.lend(5)
    pool.check()
    pool.take_back(0)
    assert pool.num_available == 4 and pool.num_held == 2
    pool.check()


class BlockPoolMachine(RuleBasedStateMachine):
    """Random operations against a model: what each holder holds, and what was published."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=9, first=3)
        self.held: list[int] = []  # one entry for each reference
        self.key_of: dict[int, bytes] = {}  # of held blocks

    @rule(below=st.integers(0, 9))
    def hand_out_last(self, below: int) -> None:
        available = self.pool.num_available
        self.pool.hand_out_last(max(below, self.pool.first))
        assert self.pool.num_available == available

    @rule(by=st.integers(1, 3))
    def lend(self, by: int) -> None:
        first = self.pool.first
        if first + by <= self.pool.num_blocks:
            lent = self.pool.lend(first + by)
            assert self.pool.first == first + by * lent
        assert not any(block < self.pool.first for block in self.held)

    @rule(by=st.integers(0, 3))
    def take_back(self, by: int) -> None:
        self.pool.take_back(max(0, self.pool.first - by))

    @rule(n=st.integers(0, 7))
    def allocate(self, n: int) -> None:
        available = self.pool.num_available
        try:
            blocks = self.pool.allocate(n)
        except OutOfBlocksError:
            assert n > available
            return
        assert len(set(blocks)) == n <= available
        assert not set(blocks) & set(self.held)
        assert all(block >= self.pool.first for block in blocks)
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(self.held))
        if self.pool.lookup(key) is None and block not in self.key_of:
            self.key_of[block] = key
        self.pool.publish(block, key)

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def acquire(self, key: bytes) -> None:
        expected = self.pool.lookup(key)
        assert self.pool.acquire(key) == expected
        if expected is not None:
            self.held.append(expected)
            self.key_of[expected] = key

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.pool.release(block)
        if block not in self.held:
            self.key_of.pop(block, None)

    @rule()
    def forget_cached(self) -> None:
        self.pool.forget_cached()
        assert self.pool.num_cached == 0

    @invariant()
    def consistent(self) -> None:
        self.pool.check()
        assert self.pool.num_held == len(set(self.held))
        for block, key in self.key_of.items():
            assert self.pool.lookup(key) == block  # what is held is never evicted


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_discarded_content_is_not_found_and_a_cached_block_is_free() -> None:
    pool = BlockPool(num_blocks=3)
    held, cached = pool.allocate(2)
    pool.publish(held, b"held")
    pool.publish(cached, b"cached")
    pool.release(cached)

    for key in (b"held", b"cached", b"unknown"):
        pool.discard(key)
        pool.check()

    assert pool.acquire(b"held") is None and pool.acquire(b"cached") is None
    assert (pool.num_held, pool.num_cached, pool.num_free) == (1, 0, 2)
    pool.release(held)
    assert pool.num_free == 3
