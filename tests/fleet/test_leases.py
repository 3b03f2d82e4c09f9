"""Limits of keys over three fronts and a ledger that may be gone, on a clock of the test's own."""

from dataclasses import dataclass, field

import msgspec
import pytest
from fakes import FakeClock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hotset.errors import RequestError
from hotset.fleet.allowance import KeyLimits, KeyShare, Kind
from hotset.fleet.leases import SILENT_S, Answer, Ask, FrontLeases, KeyAsk, Ledger

NUM_FRONTS = 3
LIMITS = KeyLimits(max_concurrent=7, requests_per_minute=30, tokens_per_minute=600)
TOKENS = 20  # of a request


@dataclass
class Front:
    """One front with one key, and what it served."""

    rank: int
    clock: FakeClock
    limits: KeyLimits = LIMITS
    num_fronts: int = NUM_FRONTS
    served: int = 0
    tokens: int = 0
    num_lost: int = 0
    share: KeyShare = field(init=False)
    leases: FrontLeases = field(init=False)

    def __post_init__(self) -> None:
        self.share = KeyShare(
            self.limits, rank=self.rank, num_fronts=self.num_fronts, clock=self.clock
        )
        self.leases = FrontLeases({"a": self.share}, rank=self.rank, num_fronts=self.num_fronts)

    def ask(self, ledger: Ledger | None, *, is_answer_lost: bool = False) -> None:
        """Ask over a wire, as the real ones do."""
        sent = msgspec.json.encode(self.leases.ask())
        answer = None
        if ledger is not None:
            answer = msgspec.json.encode(ledger.answer(msgspec.json.decode(sent, type=Ask)))
        if answer is None or is_answer_lost:
            self.num_lost += self.leases.is_leased
            self.leases.lost()
        else:
            self.leases.take(msgspec.json.decode(answer, type=Answer))

    def serve(self, tokens: int = TOKENS) -> bool:
        """Begin a request, if it may, and charge what it will come to."""
        if self.share.refusal() is not None:
            self.leases.wish(self.share)
            return False
        self.share.open()
        self.share.charge(tokens)
        self.served += 1
        self.tokens += tokens
        return True


def make(
    num_fronts: int = NUM_FRONTS, limits: KeyLimits = LIMITS
) -> tuple[FakeClock, Ledger, list[Front]]:
    clock = FakeClock()
    ledger = Ledger({"a": limits}, num_fronts=num_fronts, clock=clock)
    return clock, ledger, [Front(i, clock, limits, num_fronts) for i in range(num_fronts)]


def test_one_front_alone_has_the_whole_limit() -> None:
    clock = FakeClock()
    share = KeyShare(KeyLimits(requests_per_minute=60), clock=clock)
    for _ in range(60):
        assert share.refusal() is None
        share.open()
    refusal = share.refusal()
    assert refusal is not None and refusal.kind is Kind.REQUESTS
    assert refusal.wait_s == pytest.approx(1)
    clock.now_s += refusal.wait_s
    assert share.refusal() is None


def test_a_front_that_alone_has_users_gets_the_whole_limit() -> None:
    limits = KeyLimits(max_concurrent=7, requests_per_minute=60)
    clock, ledger, fronts = make(limits=limits)
    for _ in range(3):
        for front in fronts:
            front.ask(ledger)
        clock.now_s += 1
    busy, served = fronts[0], 0
    for _ in range(40):
        served += busy.serve(0)
        busy.ask(ledger)  # at once, as a request waits
    assert served == 7 and busy.share.refusal().kind is Kind.PLACES  # type: ignore[union-attr]
    for _ in range(1800):  # three minutes in which each request takes no time
        while busy.share.num_open:
            busy.share.close()
        if not busy.serve(0):
            busy.ask(ledger)
        clock.now_s += 0.1
        if round(clock.now_s * 10) % 10 == 0:
            for front in fronts:
                front.ask(ledger)
    assert 60 * 3 <= busy.served <= 60 * 4


def test_without_a_desk_the_fronts_together_have_the_limit() -> None:
    clock, _, fronts = make(limits=KeyLimits(max_concurrent=7))
    assert [sum(front.serve() for _ in range(9)) for front in fronts] == [3, 2, 2]
    clock, _, fronts = make()
    for _ in range(600):
        for front in fronts:
            front.serve(0)
            front.ask(None)
            while front.share.num_open:
                front.share.close()
        clock.now_s += 0.1
    assert 30 + 30 - NUM_FRONTS <= sum(front.served for front in fronts) <= 30 + 30


def test_a_desk_that_starts_again_gives_nothing_twice() -> None:
    limits = KeyLimits(requests_per_minute=60)
    clock, ledger, fronts = make(limits=limits)
    for _ in range(20):
        for front in fronts:
            front.ask(ledger)
            front.serve()
        clock.now_s += 0.01
        ledger = Ledger({"a": limits}, num_fronts=NUM_FRONTS, clock=clock)
        for front in fronts:
            front.ask(None)
            front.ask(ledger)
    assert sum(front.served for front in fronts) <= 61


def test_a_debt_of_tokens_is_paid_before_more_is_served() -> None:
    limits = KeyLimits(tokens_per_minute=600)
    clock, ledger, fronts = make(limits=limits)
    for _ in range(2):
        for front in fronts:
            front.ask(ledger)
    assert not fronts[0].serve()  # it gave back what it had no use for
    fronts[0].ask(ledger)
    assert fronts[0].serve(3000)
    seconds = served = 0
    while not served:
        for front in fronts:
            front.ask(ledger)
            served += seconds > 1 and front.serve(0)  # the others may still use what they hold
        clock.now_s += 1
        seconds += 1
    assert 238 <= seconds <= 245  # 3000 less the 600 of the start


def test_places_of_a_front_that_fell_silent_are_kept_a_while() -> None:
    limits = KeyLimits(max_concurrent=6)
    clock, ledger, fronts = make(limits=limits)
    for front in fronts:
        front.ask(ledger)
    for _ in range(4):
        for front in fronts:
            front.ask(ledger)
    for _ in range(9):
        fronts[0].serve()
        fronts[0].ask(ledger)
    assert fronts[0].share.num_open == 6
    clock.now_s += SILENT_S + 1
    for _ in range(3):
        assert not fronts[1].serve()
        fronts[1].ask(ledger)
    clock.now_s += 61
    for _ in range(9):
        fronts[1].serve()
        fronts[1].ask(ledger)
        fronts[2].ask(ledger)
    assert fronts[1].share.num_open == 4  # all but the share of front 0


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (Ask(0, 2, True), "start all with the same number"),
        (Ask(3, 3, True), "one of 3 fronts"),
        (Ask(0, 3, True, {"b": KeyAsk()}), "a key 'b' that the desk does not have"),
    ],
)
def test_fronts_of_another_fleet_are_refused(ask: Ask, says: str) -> None:
    _, ledger, _ = make()
    with pytest.raises(RequestError, match=says):
        ledger.answer(ask)


class Machine(RuleBasedStateMachine):
    """Three fronts ask, serve and end requests; asks, answers and the desk are lost at any time."""

    @initialize()
    def start(self) -> None:
        self.clock, self.ledger, self.fronts = make()
        self.is_up = True
        self.num_restarts = 0

    fronts_drawn = st.integers(0, NUM_FRONTS - 1)

    @rule(rank=fronts_drawn, count=st.integers(1, 12))
    def serve(self, rank: int, count: int) -> None:
        for _ in range(count):
            self.fronts[rank].serve()

    @rule(rank=fronts_drawn, count=st.integers(1, 12))
    def end(self, rank: int, count: int) -> None:
        share = self.fronts[rank].share
        for _ in range(min(count, share.num_open)):
            share.close()

    @rule(rank=fronts_drawn, is_answer_lost=st.booleans())
    def ask(self, rank: int, is_answer_lost: bool) -> None:
        self.fronts[rank].ask(self.ledger if self.is_up else None, is_answer_lost=is_answer_lost)

    @rule(
        seconds=st.sampled_from([1.0, SILENT_S + 0.1, 20.0, 60.0]),
        cut=st.sets(fronts_drawn, max_size=2),
        busy=st.sets(fronts_drawn),
        is_one_way=st.booleans(),
    )
    def wait(self, seconds: float, cut: set[int], busy: set[int], is_one_way: bool) -> None:
        """Fronts ask each second, in vain where they are cut off; busy ones serve what they may."""
        passed = 0.0
        while passed < seconds:
            step = min(1.0, seconds - passed)
            self.clock.now_s += step
            passed += step
            for front in self.fronts:
                is_cut = front.rank in cut
                ledger = self.ledger if self.is_up and (is_one_way or not is_cut) else None
                front.ask(ledger, is_answer_lost=is_cut)
                while front.rank in busy and front.serve():
                    front.share.close()

    @rule(seconds=st.floats(0, 8))
    def hang(self, seconds: float) -> None:
        """Nobody asks for a while."""
        self.clock.now_s += seconds

    @rule()
    def kill(self) -> None:
        self.is_up = False
        self.num_restarts += 1

    @rule()
    def restart(self) -> None:
        if not self.is_up:
            self.ledger = Ledger({"a": LIMITS}, num_fronts=NUM_FRONTS, clock=self.clock)
            self.is_up = True

    @invariant()
    def no_key_is_served_more_than_its_limit_and_a_lease(self) -> None:
        minutes = self.clock.now_s / 60
        num_lost = sum(front.num_lost for front in self.fronts)
        # Each time a front goes on alone, its part refills here and there until the desk sees it.
        requests, tokens = LIMITS.requests_per_minute, LIMITS.tokens_per_minute
        assert requests is not None and tokens is not None
        twice = num_lost * (SILENT_S + 8) / 60 / NUM_FRONTS  # `hang` delays that by 8 s at most
        assert sum(one.served for one in self.fronts) <= requests * (1 + minutes + twice) + 1
        overdrawn = NUM_FRONTS * TOKENS  # what a request comes to is not known before
        served = sum(one.tokens for one in self.fronts)
        assert served <= tokens * (1 + minutes + twice) + overdrawn + 1
        open_ = sum(one.share.num_open for one in self.fronts)
        assert LIMITS.max_concurrent is not None
        assert open_ <= LIMITS.max_concurrent * (2 if num_lost or self.num_restarts else 1)


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestLeases = Machine.TestCase
