"""How many replicas a fleet needs, and when it grows and shrinks."""

import pytest
from fakes import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from hotset.fleet.scaling import Arrivals, Need, Scaler, ScalingOptions, replicas_needed

TOLD = ScalingOptions(replicas=1, max_replicas=10, wait_target_s=2, start_s=60)
IDLE = Need(0, 1000, 0)


@pytest.mark.parametrize(
    ("needs", "arriving", "growth", "expected"),
    [
        ([], 1000, 0, 0),
        ([IDLE] * 3, 0, 0, 0),
        ([Need(4001, 1000, 0), IDLE], 0, 0, 3),  # 4.001 s wait, 2 s may on each
        ([Need(2000, 1000, 0), Need(4000, 2000, 0)], 0, 0, 2),  # seconds, not tokens
        ([IDLE] * 2, 1400, 0, 2),  # 0.7 of 1000 tokens/s each
        ([IDLE] * 2, 1401, 0, 3),
        ([IDLE] * 2, 700, 1 / 60, 2),  # twice as much when a new replica serves
        ([IDLE] * 2, 700, -1, 1),
        ([Need(0, 1000, 0.85), Need(0, 1000, 0.85)], 0, 0, 2),
        ([Need(0, 1000, 0.9), Need(0, 1000, 0.85)], 0, 0, 3),
    ],
)
def test_the_need_is_the_most_of_what_waits_comes_and_is_held(
    needs: list[Need], arriving: float, growth: float, expected: int
) -> None:
    assert replicas_needed(needs, arriving, growth, TOLD) == expected


def test_a_load_says_what_is_needed() -> None:
    load = {
        "queued_tokens": 500,
        "spare_blocks": 25,
        "usable_blocks": 100,
        "prefill_tokens_per_s": 1000,
    }
    assert Need.of(load) == Need(500, 1000, 0.75)
    assert Need.of({**load, "spare_blocks": -10}).kv_share == 1  # requests wait for blocks


def test_a_fleet_grows_at_once_and_shrinks_one_by_one_after_a_while() -> None:
    clock = FakeClock()
    scaler = Scaler(TOLD, clock=clock)
    assert scaler.follow(0) == 1
    assert scaler.follow(4) == 4
    seen = []
    for _ in range(130):  # 1,300 s with work for two
        clock.now_s += 10
        seen.append(scaler.follow(2))
    assert [seen.count(n) for n in (4, 3, 2)] == [60, 60, 10]
    assert scaler.follow(50) == 10


def test_work_in_between_starts_the_wait_again() -> None:
    clock = FakeClock()
    scaler = Scaler(TOLD, clock=clock)
    scaler.follow(3)
    for needed in (2, 3, 2):
        clock.now_s += 500
        assert scaler.follow(needed) == 3


@given(st.lists(st.tuples(st.floats(0, 400), st.integers(0, 20)), max_size=40))
def test_the_target_stays_between_its_bounds_and_never_falls_by_two(
    rounds: list[tuple[float, int]],
) -> None:
    clock = FakeClock()
    scaler = Scaler(TOLD, clock=clock)
    for passed_s, needed in rounds:
        clock.now_s += passed_s
        before = scaler.target
        target = scaler.follow(needed)
        assert 1 <= target <= 10 and target >= before - 1
        assert target >= min(needed, 10)


def test_arrivals_are_a_minutes_mean_whichever_replica_they_went_to() -> None:
    clock = FakeClock()
    arrivals = Arrivals(clock=clock)
    a = b = 0.0
    for second in range(1, 121):
        clock.now_s = float(second)
        a += 100 if second <= 60 else 150
        b += 50
        arrivals.count({"a": a, "b": b})
    assert arrivals.per_s == pytest.approx(200)
    assert arrivals.growth_per_s == pytest.approx((200 / 147.5 - 1) / 60)  # the first count is none
    clock.now_s += 1
    arrivals.count({"a": 30.0, "b": b})  # it has started again
    assert arrivals.per_s == pytest.approx(200 - 200 / 60)


def test_a_replica_that_is_there_already_brings_no_arrivals() -> None:
    clock = FakeClock()
    arrivals = Arrivals(clock=clock)
    clock.now_s = 10.0
    arrivals.count({"a": 1e6})
    assert arrivals.per_s == 0 and arrivals.growth_per_s == 0
