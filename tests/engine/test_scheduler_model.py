"""The scheduler with its KV cache against blocks whose content is known: nothing reads a wrong one.

Tiers of any size, slow and faulty, shared prefixes, aborts, rotation and a step in flight.
"""

import itertools
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import pytest
from fakes import FakeClock, FakeDevice, FakeTiers
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hotset.cost.prefix import PrefixPolicy
from hotset.cost.rates import Rates
from hotset.engine.scheduler import Scheduler
from hotset.engine.step import Step
from hotset.kv.cache import KVCache
from hotset.kv.index_blocks import IndexBlocks
from hotset.kv.pool import BlockPool
from hotset.kv.seats import Seats
from hotset.kv.state_slots import StateSlots
from hotset.memory.state_pieces import StatePieces
from hotset.metrics import Metrics
from hotset.request import FinishReason, SamplingParams
from hotset.sequence import PADDING_SLOT, UNKNOWN_TOKEN, ZEROS_SLOT, Request, RequestStatus

BLOCK = 4
MAX_TOKENS = 40
PREFIXES = [[seed * 50 + i for i in range(20)] for seed in range(3)]


class SchedulerMachine(RuleBasedStateMachine):
    """Each rule is something that happens to a scheduler; the content of blocks is checked."""

    @initialize(
        num_blocks=st.integers(10, 24),
        num_slots=st.integers(0, 60),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        mixed_budget=st.integers(1, 24),
        row_tile=st.sampled_from([1, 4]),
        rotation_s=st.sampled_from([None, 1.0]),
        mode=st.sampled_from(["fetch", "auto", "recompute"]),
        prefix_caching=st.booleans(),
        ahead_tokens=st.just(256),
        hot_blocks=st.just(0),
        num_seats=st.just(0),
        values=st.just((1, 1)),
        states=st.none(),
        pieces=st.none(),
    )
    def start(
        self,
        num_blocks: int,
        num_slots: int,
        max_num_seqs: int,
        budget: int,
        mixed_budget: int,
        row_tile: int,
        rotation_s: float | None,
        mode: str,
        prefix_caching: bool,
        ahead_tokens: int,
        hot_blocks: int,
        num_seats: int,
        values: tuple[int, int],
        states: StateSlots | None,
        pieces: StatePieces | None,
    ) -> None:
        self.device = self.make_device(num_blocks, values)
        self.tiers = FakeTiers(self.device)
        self.tiers.num_slots = num_slots
        self.clock = FakeClock()
        seats, pool = None, BlockPool(num_blocks)
        index_blocks = IndexBlocks(
            pool, first=num_blocks + 1, row_bytes=values[0], index_bytes=values[1]
        )
        if hot_blocks:
            seats = Seats(num_seats=num_seats, num_slots=hot_blocks * BLOCK, block_size=BLOCK)
        rates, metrics = Rates(1.0, {"host": 100.0, "disk": 50.0}), Metrics()
        self.kv = KVCache(
            pool,
            block_size=BLOCK,
            fingerprint="model",
            metrics=metrics,
            tiers=self.tiers,
            policy=PrefixPolicy(rates, bytes_per_token=1, mode=mode),  # type: ignore[arg-type]
            prefix_caching=prefix_caching,
            seats=seats,
            index_blocks=index_blocks,
            states=states,
            pieces=pieces,
        )
        self.scheduler = Scheduler(
            self.kv,
            metrics=metrics,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_mixed_tokens=mixed_budget,
            row_tile=row_tile,
            rotation_s=rotation_s,
            ahead_tokens=ahead_tokens,
            users_at_once=lambda wanted, context: max_num_seqs,
            clock=self.clock,
        )
        self.requests: list[Request] = []
        self.families: list[list[Request]] = []
        self.in_flight: list[Request] = []
        self.ids = itertools.count()

    def make_device(self, num_blocks: int, values: tuple[int, int]) -> FakeDevice:
        return FakeDevice(BLOCK, first_index_block=num_blocks + 1, values=values)

    @rule(
        prefix=st.sampled_from(PREFIXES),
        num_shared=st.integers(1, 20),
        own=st.lists(st.integers(0, 3), max_size=6),
        max_tokens=st.integers(1, 14),
        priority=st.sampled_from([0, 0, 0, 1]),
        n=st.sampled_from([1, 1, 1, 2]),
        copies=st.sampled_from([1, 1, 3]),
        tenant=st.sampled_from("ab"),
    )
    def add(
        self,
        prefix: list[int],
        num_shared: int,
        own: list[int],
        max_tokens: int,
        priority: int,
        n: int,
        copies: int,
        tenant: str,
    ) -> None:
        tokens = prefix[:num_shared] + own
        for _ in range(copies):
            family = [
                Request(
                    request_id=f"r{next(self.ids)}",
                    prompt_len=len(tokens),
                    token_ids=list(tokens),
                    params=SamplingParams(max_tokens=max_tokens, n=n),
                    max_total_tokens=min(MAX_TOKENS, len(tokens) + max_tokens),
                    priority=priority,
                    tenant=tenant,
                    arrival_s=self.clock.now(),
                )
                for _ in range(n)
            ]
            self.requests += family
            self.families.append(family)
            self.scheduler.add(family)

    @rule(which=st.integers(0, 100), more=st.lists(st.integers(0, 3), max_size=6))
    def go_on(self, which: int, more: list[int]) -> None:
        """The next turn of one that has ended."""
        ended = [r for r in self.requests if r.is_finished and UNKNOWN_TOKEN not in r.token_ids]
        if not ended:
            return
        tokens = [*ended[which % len(ended)].token_ids, *more][: MAX_TOKENS - 4]
        self.add(
            tokens, len(tokens), [], max_tokens=4, priority=0, n=1, copies=1 + which % 2, tenant="a"
        )

    @rule()
    def step(self) -> None:
        """As the engine: the tokens of the last step are known after the next is scheduled."""
        self.kv.poll()
        plan = self.scheduler.schedule()
        self.clock.now_s += 0.1
        self.collect()
        self.check_shares(plan)
        self.device.compute(plan)
        self.scheduler.commit(plan)
        for item in plan.items:
            if item.samples and not item.request.is_finished:
                self.in_flight.append(item.request)
                item.request.token_ids.append(UNKNOWN_TOKEN)
                item.request.pending_row = 0

    def check_shares(self, plan: Step) -> None:
        """No more than the budget, and the first in order that can go on does."""
        num_tokens = {item.request: item.num_tokens for item in plan.items}
        assert sum(num_tokens.values()) <= self.scheduler.max_num_batched_tokens
        assert len(num_tokens) == len(plan.items)
        if not self.kv.transfers.num_blocks_after_spills and self.scheduler.row_tile == 1:
            runnable = [
                one for one in self.scheduler.running if self.kv.tables.num_runnable_tokens(one)
            ]
            going = [one for one in runnable if not one.is_complete]
            assert num_tokens or not going, "somebody could go on"

    def collect(self) -> None:
        for request in self.in_flight:
            if request.is_finished:
                continue
            # As a model does: what follows depends on all that went before.
            request.token_ids[-1] = sum(request.token_ids[:-1]) % 7
            request.pending_row = None
            if request.is_complete:
                self.scheduler.finish(request, FinishReason.LENGTH)
        self.in_flight.clear()

    @precondition(lambda self: self.tiers.spilling)
    @rule(data=st.data())
    def end_spill(self, data: st.DataObject) -> None:
        self.tiers.end_spill(data.draw(st.sampled_from(list(self.tiers.spilling))))

    @precondition(lambda self: self.tiers.fetching)
    @rule(data=st.data(), ok=st.booleans())
    def end_fetch(self, data: st.DataObject, ok: bool) -> None:
        self.tiers.end_fetch(data.draw(st.integers(0, len(self.tiers.fetching) - 1)), ok=ok)

    @rule()
    def end_transfers(self) -> None:
        self.tiers.end_all()

    @rule()
    def pass_time(self) -> None:
        self.clock.now_s += 1.0

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.scheduler.finish(request, FinishReason.ABORT)

    @rule()
    def lose_the_cache(self) -> None:
        self.kv.pool.forget_cached()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "kv"):
            self.kv.check()
            for request in self.scheduler.waiting:
                assert request.status is RequestStatus.WAITING and not request.kv.block_table
            orders = [request.order for request in self.scheduler.running]
            assert orders == sorted(orders)

    @invariant()
    def found_tokens_are_counted_once(self) -> None:
        if not hasattr(self, "kv"):
            return
        metrics = self.scheduler.metrics
        usages = [max(one.kv.num_cached_tokens for one in family) for family in self.families]
        assert metrics.cached_tokens.total() == sum(usages)
        for family, cached in zip(self.families, usages, strict=True):
            assert 0 <= cached < family[0].prompt_len
        prompts = ((len(family) - 1) * (family[0].prompt_len - 1) for family in self.families)
        assert 0 <= metrics.forked_tokens <= sum(prompts)
        if not metrics.preemptions:
            assert metrics.resumed_tokens.total() == 0

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for _ in range(5000):
            if not self.scheduler.has_requests:
                break
            self.step()
            self.tiers.end_all()
            self.consistent()
        assert all(request.is_finished for request in self.requests), "a request waits for ever"
        self.kv.poll()
        self.tiers.end_all()
        self.kv.poll()
        assert self.kv.pool.num_held == 0
        assert not self.tiers.kept
        assert self.kv.tables.index_blocks.num_used == 0


class HotMachine(SchedulerMachine):
    """The same where the device is small, so that requests turn hot, while host memory lasts."""

    @initialize(
        num_blocks=st.integers(10, 16),
        num_slots=st.sampled_from([12, 30, 200]),
        rotation_s=st.sampled_from([None, None, 1.0]),
        prefix_caching=st.booleans(),
        hot_blocks=st.integers(1, 3),
        num_seats=st.integers(1, 4),
        values=st.sampled_from([(9, 2), (12, 5), (16, 3)]),
    )
    def start(self, **chosen: Any) -> None:
        sizes = {"max_num_seqs": 6, "budget": 24, "mixed_budget": 24, "row_tile": 1}
        super().start(**sizes, **chosen, ahead_tokens=4, mode="fetch", states=None, pieces=None)

    @rule(own=st.lists(st.integers(0, 3), min_size=16, max_size=24))
    def add_long(self, own: list[int]) -> None:
        self.add([], 0, own, max_tokens=14, priority=0, n=1, copies=3, tenant="a")

    @rule()
    def run_on(self) -> None:
        for _ in range(4):
            self.step()
            self.tiers.end_all()

    @precondition(lambda self: getattr(self, "kv", None) and self.kv.hot.num_hot)
    @rule()
    def fail(self) -> None:
        self.kv.hot.forget_slots()

    @precondition(lambda self: getattr(self, "kv", None) and self.kv.hot.num_hot)
    @rule(which=st.integers(0, 3))
    def preempt_hot(self, which: int) -> None:
        """It goes on hot later, or resident where host memory lacks some of it."""
        hot = [one for one in self.scheduler.running if one.kv.seat is not None]
        victim = hot[which % len(hot)]
        if not victim.is_complete:
            self.scheduler.running.remove(victim)
            self.scheduler._preempt(victim)


@dataclass
class StateDevice(FakeDevice):
    """With slots of states, of which each piece is the tokens that the state is after."""

    pieces: StatePieces = field(default_factory=lambda: StatePieces(0, 1, 1))
    slots: dict[int, list[list[int] | None]] = field(default_factory=dict)

    def write(self, slot: int, tokens: list[int] | None) -> None:
        self.slots[slot] = [tokens] * self.pieces.per_state

    def read(self, slot: int) -> list[int] | None:
        first, *others = self.slots[slot]
        return first if all(other == first for other in others) else None

    def content(self, block: int) -> Any:
        if block < self.pieces.first:
            return super().content(block)
        slot, piece = divmod(block - self.pieces.first, self.pieces.per_state)
        return self.slots[slot][piece] or []

    def fill(self, block: int, content: Any) -> None:
        if block < self.pieces.first:
            super().fill(block, content)
            return
        slot, piece = divmod(block - self.pieces.first, self.pieces.per_state)
        self.slots.setdefault(slot, [None] * self.pieces.per_state)[piece] = content


class StateMachine(SchedulerMachine):
    """The same of a model whose layers keep a state: what a slot has is checked too."""

    @initialize(
        num_blocks=st.integers(10, 24),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        row_tile=st.sampled_from([1, 4]),
        prefix_caching=st.booleans(),
        ahead_tokens=st.sampled_from([1, 256]),
        num_slots=st.sampled_from([0, 8, 30, 200]),
        rotation_s=st.sampled_from([None, None, 1.0]),
        mode=st.sampled_from(["fetch", "fetch", "auto", "recompute"]),
        num_states=st.integers(1, 12),
        num_pieces=st.integers(1, 3),
        grid=st.sampled_from([4, 8]),
        keeps_below=st.sampled_from([True, True, False]),
    )
    def start(
        self, num_states: int, num_pieces: int, grid: int, keeps_below: bool, **chosen: Any
    ) -> None:
        self.pieces = StatePieces(chosen["num_blocks"] + 1, num_pieces, 1)
        super().start(
            **chosen,
            mixed_budget=chosen["budget"],
            hot_blocks=0,
            num_seats=0,
            values=(1, 1),
            states=StateSlots(num_states, grid=grid),
            pieces=self.pieces if keeps_below else None,
        )
        assert self.kv.states is not None
        self.kv.states.leaders.fewest_tokens = 4

    def make_device(self, num_blocks: int, values: tuple[int, int]) -> FakeDevice:
        self.states = StateDevice(BLOCK, first_index_block=num_blocks + 1, pieces=self.pieces)
        self.states.write(ZEROS_SLOT, [])
        return self.states

    def choose(self) -> None:
        """What the step in flight chose, which the device knows before the host does."""
        for request in self.in_flight:
            if not request.is_finished:
                request.token_ids[-1] = sum(request.token_ids[:-1]) % 7

    @rule()
    def step(self) -> None:
        """As the engine: a step is on the device before the tokens of the last one are known."""
        self.kv.poll()
        self.clock.now_s += 0.1
        plan = self.scheduler.schedule()
        self.choose()
        self.device.compute(plan)
        self.go_through_states(plan)
        self.collect()
        self.scheduler.commit(plan)
        for item in plan.items:
            if item.samples and not item.request.is_finished:
                self.in_flight.append(item.request)
                item.request.token_ids.append(UNKNOWN_TOKEN)
                item.request.pending_row = 0

    def go_through_states(self, plan: Step) -> None:
        """Check that each reads the state after the tokens before, and write those it writes."""
        written: set[int] = set()
        for item in plan.items:
            tokens, kv = item.request.token_ids, item.request.kv
            assert self.states.read(kv.state_read) == tokens[: item.start], "another state is read"
            assert kv.state_read not in written, "a state is read that this step has written"
            ends = [(cut.position, cut.slot) for cut in kv.cuts]
            assert ends == sorted(ends, key=itemgetter(0))
            for position, slot in (*ends, (item.start + item.num_tokens, kv.state_write)):
                assert item.start < position <= item.start + item.num_tokens
                assert slot not in written and slot not in (ZEROS_SLOT, PADDING_SLOT)
                assert self.is_unheld(slot, item.request)
                written.add(slot)
                self.states.write(slot, tokens[:position])

    def is_unheld(self, slot: int, request: Request) -> bool:
        """Whether no other request reads or writes a slot."""
        others = (one for one in self.scheduler.running if one is not request)
        return all(slot not in (one.kv.state_read, one.kv.state_write) for one in others)

    @rule()
    def fail_a_step(self) -> None:
        """As the engine where a step did not run to its end: its youngest request pays."""
        plan = self.scheduler.schedule()
        self.choose()
        for item in plan.items:
            for slot in (item.request.kv.state_write, *(cut.slot for cut in item.request.kv.cuts)):
                self.states.write(slot, None)
        self.device.copy(plan)
        if plan.items:
            self.scheduler.step_failed(plan)
            self.scheduler.finish(plan.items[-1].request, FinishReason.ERROR, "it failed")
        self.collect()

    @rule()
    def lose_the_states(self) -> None:
        assert self.kv.states is not None
        self.kv.states.slots.pool.forget_cached()

    @rule(is_all=st.booleans())
    def leave_the_device(self, is_all: bool) -> None:
        for _ in range(8):
            self.step()
            self.tiers.end_all()
        self.lose_the_states()
        if is_all:
            self.kv.pool.forget_cached()

    @rule(which=st.integers(0, 100), lost=st.lists(st.sampled_from([0, -1]), max_size=3))
    def come_back(self, which: int, lost: list[int]) -> None:
        """What a request that has ended left comes back for the next turn, or not all of it."""
        self.leave_the_device(is_all=True)
        self.go_on(which, more=[1, 2])
        self.step()
        for index in lost:
            if self.tiers.fetching:
                self.tiers.end_fetch(index, ok=False)
        self.tiers.end_all()
        self.step()

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def preempt_the_last(self) -> None:
        """While nothing is in flight, as between two steps."""
        self.collect()
        if self.scheduler.running:
            self.scheduler._preempt_last()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "kv"):
            assert self.kv.states is not None
            while self.kv.states._due or self.tiers.spilling:
                self.tiers.end_all()
                self.kv.poll()
            assert self.kv.states.slots.pool.num_held == 0
            assert not any(request.kv.parked for request in self.requests)


@pytest.mark.parametrize("machine", [SchedulerMachine, HotMachine, StateMachine])
def test_whatever_happens_every_token_attends_to_the_tokens_before_it(machine: Any) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(max_examples=150, stateful_step_count=50, deadline=None),
    )
