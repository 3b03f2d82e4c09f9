"""Fetch or compute: the cheapest is chosen, and planner, bench and engine choose alike."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.bench.predict import predict
from hotset.bench.workload import Spec, make_work
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.hardware import load_hardware
from hotset.cost.prefix import Mode, PrefixPolicy, StatePlace, split_prefix
from hotset.cost.rates import Rates
from hotset.cost.routing import Routing
from hotset.cost.step_time import CostModel
from hotset.layout import Layout
from hotset.plan.planner import make_plan
from hotset.plan.workload import Request, Workload

COLD = st.integers(0, 5000)
SIZES = st.floats(1e3, 1e6)
LINKS = st.floats(1e8, 1e12)
QUEUED_BYTES = st.floats(0, 1e11)
PREFILLS = st.floats(10, 1e6)
QUEUED_TOKENS = st.floats(0, 1e5)


@given(COLD, SIZES, LINKS, QUEUED_BYTES, PREFILLS, QUEUED_TOKENS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_prefix_is_ready_as_early_as_by_the_best_of_all_splits(
    cold: int,
    size: float,
    link: float,
    queue: float,
    rate: float,
    waiting: float,
    others_run: bool,
) -> None:
    def compute(x: int) -> float:
        return (waiting + x) / rate if x else 0.0

    def fetch(y: int) -> float:
        return (queue + y * size) / link if y else 0.0

    def ready(x: int) -> float:
        return max(compute(x), fetch(cold - x))

    chosen, ready_s = split_prefix(
        Rates(rate, {"host": link}),
        cold,
        ["host"],
        bytes_per_token=size,
        others_run=others_run,
        queued_bytes=queue,
        queued_tokens=waiting,
    )
    assert 0 <= chosen <= cold
    assert ready_s == ready(chosen)
    if others_run and fetch(cold) <= compute(cold):
        assert chosen == 0
        return
    tried = {0, cold, *range(0, cold + 1, max(1, cold // 100))}
    assert ready(chosen) <= min(map(ready, tried)) * (1 + 1e-9)


@given(COLD, SIZES, LINKS, QUEUED_BYTES, PREFILLS, st.floats(1, 8))
def test_a_longer_queue_on_the_link_never_computes_less(
    cold: int, size: float, link: float, queue: float, rate: float, factor: float
) -> None:
    def chosen(queued_bytes: float) -> int:
        return split_prefix(
            Rates(rate, {"host": link}),
            cold,
            ["host"],
            bytes_per_token=size,
            others_run=False,
            queued_bytes=queued_bytes,
        ).computed_tokens

    assert chosen(queue) <= chosen(queue * factor) + 1  # a tie may round to either side


def test_the_slowest_tier_counts_for_all() -> None:
    rates = Rates(1e4, {"host": 1e9, "disk": 1e7})
    policy = PrefixPolicy(rates, bytes_per_token=100_000)
    disk, both, host = (
        policy.split(1000, tiers, queued_bytes=0, queued_tokens=0).computed_tokens
        for tiers in ({"disk"}, {"host", "disk"}, {"host"})
    )
    assert disk == both > host


# 1,000 tokens/s computed; 100 tokens/s of 10 bytes, or a state of 5,000 bytes in 5 s, fetched.
STATE_RATES = Rates(1000.0, {"host": 1000.0, "disk": 100.0})
NOTHING = StatePlace(0, 0, False, set())


def test_a_request_starts_where_it_is_at_its_end_soonest() -> None:
    policy = PrefixPolicy(STATE_RATES, bytes_per_token=10, state_bytes=5000)

    def chosen(*places: StatePlace, queued_bytes: int = 0, queued_tokens: int = 0) -> int:
        queued = {"queued_bytes": queued_bytes, "queued_tokens": queued_tokens}
        return policy.place_to_start([*places, NOTHING], **queued)

    far, near = (StatePlace(n, 0, True, {"host"}) for n in (6000, 4000))
    assert chosen(far) == 0  # 5 s to fetch a state and 6 s to compute
    assert chosen(near) == 1  # 4 s to compute
    assert chosen(far, queued_bytes=1001) == 1  # 6.001 s to fetch
    assert chosen(near, queued_tokens=1001) == 0  # the fetch takes no time from others
    cold = StatePlace(6000, 200, True, {"host"})
    assert chosen(cold) == 1  # 7 s with the KV of 200 tokens
    assert chosen(cold, StatePlace(5000, 0, False, set())) == 1  # 1 s: the device has it
    assert chosen(StatePlace(6000, 0, True, {"host", "disk"})) == 1  # 50 s from disk


def test_modes_say_where_a_request_starts() -> None:
    places = [StatePlace(9, 0, True, {"disk"}), StatePlace(8, 0, False, set()), NOTHING]
    for mode, expected in (("fetch", 0), ("recompute", 1)):
        policy = PrefixPolicy(STATE_RATES, bytes_per_token=10, state_bytes=5000, mode=mode)
        assert policy.place_to_start(places, queued_bytes=0, queued_tokens=0) == expected
        assert policy.is_worth_state(1, "disk") == (mode == "fetch")


def test_a_state_is_worth_a_copy_from_as_many_tokens_on_as_take_longer_to_compute() -> None:
    policy = PrefixPolicy(STATE_RATES, bytes_per_token=0, state_bytes=5000)
    assert policy.fetch_s(0, "host") == 5.0
    assert not policy.is_worth_state(5000, "host") and policy.is_worth_state(5001, "host")
    assert not policy.is_worth_state(50_000, "disk") and policy.is_worth_state(50_001, "disk")


@pytest.mark.parametrize("wrong", ["link_bytes_per_s", "prefill_tokens_per_s", "bytes_per_token"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_prefix_needs_rates_above_zero(wrong: str, value: float) -> None:
    good = {"bytes_per_token": 1.0, "link_bytes_per_s": 1.0, "prefill_tokens_per_s": 1.0}
    given = {**good, wrong: value}
    rates = Rates(given["prefill_tokens_per_s"], {"host": given["link_bytes_per_s"]})
    with pytest.raises(ValueError, match=wrong):
        split_prefix(rates, 8, ["host"], bytes_per_token=given["bytes_per_token"], others_run=False)


@pytest.mark.parametrize("link", ["1", "3", "10", "pcie5"])
@pytest.mark.parametrize("users", [1, 8])
def test_planner_bench_and_engine_compute_the_same_part_of_a_prefix(link: str, users: int) -> None:
    """A prefix of 3,600 tokens in host memory; all three are told the same rates."""
    chips = load_hardware("h200").with_link(link).with_tiers(host_gib=931, disk_gib=0)
    shape = load_model("llama-3-8b")
    cost = CostModel(shape, chips, Layout(), "bf16", CALIBRATIONS["hotset"], Routing())
    load = Workload(users=users, context=4064, output=64, reuse=0.9)
    planned = make_plan(
        Request(
            shape,
            chips,
            load,
            Layout(),
            host_given=True,
            calibration=CALIBRATIONS["hotset"],
        )
    )

    spec = Spec("multiturn", users=users, turns=2, first_tokens=3536, output_tokens=64)
    size = shape.kv_bytes_per_token("bf16")
    benched = predict(
        cost,
        make_work(spec, shape.vocab_size),
        hot_tokens=16,
        host_tokens=10**9,
        disk_tokens=0,
        max_num_seqs=256,
        max_batched_tokens=8192,
    )

    rates = Rates(3600 / cost.prefill_s(3600), {"host": cost.link_bytes_per_s()})
    policy = PrefixPolicy(rates, bytes_per_token=size)
    queued_tokens = 1 if users > 1 else 0  # another request waits
    split = policy.split(3600, {"host"}, queued_bytes=0, queued_tokens=queued_tokens)
    computed = split.computed_tokens
    assert planned.turn.found == 3600
    assert planned.turn.recomputed == pytest.approx(computed, abs=1)
    assert benched.fetched_tokens == pytest.approx(users * (3600 - computed), abs=users)


@pytest.mark.parametrize(("mode", "expected"), [("fetch", (0, 2.0)), ("recompute", (1000, 0.11))])
def test_what_the_user_chose_takes_the_time_that_it_takes(
    mode: Mode, expected: tuple[int, float]
) -> None:
    policy = PrefixPolicy(Rates(1e4, {"disk": 1e6}), bytes_per_token=2000, mode=mode)
    assert policy.split(1000, {"disk"}, queued_bytes=0, queued_tokens=100) == expected
