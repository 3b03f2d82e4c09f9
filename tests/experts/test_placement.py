"""Placements hold every expert, keep to their budget, and are no worse than round robin."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.errors import PlanError
from hotset.experts.placement import Placement, measure, place, round_robin


@st.composite
def histories(draw: st.DrawFn) -> list[list[int]]:
    num_experts = draw(st.integers(1, 12))
    row = st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts)
    return draw(st.lists(row, min_size=1, max_size=6))


@settings(max_examples=200, deadline=None)
@given(histories(), st.integers(1, 6), st.integers(0, 8), st.booleans())
def test_any_placement_is_whole_within_budget_even_and_no_worse_than_round_robin(
    history: list[list[int]], num_devices: int, num_replicas: int, co_activation: bool
) -> None:
    placement = place(history, num_devices, num_replicas=num_replicas, co_activation=co_activation)
    num_experts = len(history[0])
    copies = placement.num_copies
    assert set(copies) == set(range(num_experts))  # every expert is somewhere
    assert sum(copies.values()) <= num_experts + num_replicas
    for experts in placement.devices:
        assert len(set(experts)) == len(experts)  # no expert twice on a device
        assert len(experts) <= math.ceil((num_experts + num_replicas) / num_devices)

    after = measure(placement, history)
    before = measure(round_robin(num_experts, num_devices), history)
    assert after.max_load <= before.max_load * (1 + 1e-9)
    total = sum(map(sum, history))
    assert math.isclose(sum(after.device_loads), total, abs_tol=1e-6)  # loads are conserved
    assert math.isclose(after.mean_load, before.mean_load, abs_tol=1e-6)
    assert after.step_max_load <= after.max_load + 1e-6


def test_greedy_spreads_hot_experts_that_round_robin_puts_together() -> None:
    history = [[90, 1, 80, 1]]
    assert measure(round_robin(4, 2), history).max_load == 170
    assert measure(place(history, 2), history).max_load == 91


def test_experts_busy_at_the_same_time_are_kept_apart_at_equal_load() -> None:
    # 0 and 1 are busy together, then 2 and 3; all four have the same load over both steps.
    history = [[10, 10, 0, 0], [0, 0, 10, 10]]
    placement = place(history, 2)
    assert {0, 1} not in [set(d) for d in placement.devices]
    assert measure(placement, history).step_max_load == 10
    together = Placement(((0, 1), (2, 3)))
    assert measure(together, history).max_load == measure(placement, history).max_load
    assert measure(together, history).step_max_load == 20


def test_co_activation_lowers_the_load_of_the_busiest_device_in_a_step() -> None:
    rng = random.Random(0)
    history = []
    for _ in range(60):  # one topic a step, each with eight experts of its own
        topic = rng.randrange(4)
        history.append(
            [rng.randint(20, 40) * (e % 4 == topic) + rng.randint(0, 3) for e in range(32)]
        )
    apart = measure(place(history, 4), history)
    by_load = measure(place(history, 4, co_activation=False), history)
    before = measure(round_robin(32, 4), history)
    assert apart.step_max_load < by_load.step_max_load < before.step_max_load


def test_replicas_go_to_the_hottest_and_divide_its_load() -> None:
    history = [[100, 10, 10, 10]]
    assert measure(place(history, 2), history).max_load == 110  # room for two each
    placement = place(history, 2, num_replicas=1)
    assert placement.num_copies[0] == 2
    assert measure(placement, history).max_load == 70
    # A second copy on the same device would help nobody.
    assert place(history, 2, num_replicas=50).num_copies[0] == 2


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([[1, 2], [1]], "different numbers"),
        ([[1, -2]], "0 or more"),
        ([[1, float("nan")]], "0 or more"),
        ([["a", "b"]], "not made of counts"),
        ([[[1], [2]]], "0 or more"),
    ],
)
def test_a_history_that_is_no_table_of_counts_is_refused(history: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        place(history, 2)  # type: ignore[arg-type]


def test_numbers_out_of_range_and_other_experts_are_refused() -> None:
    with pytest.raises(PlanError, match="0 devices"):
        place([[1, 2]], 0)
    with pytest.raises(PlanError, match="-1 replicas"):
        place([[1, 2]], 1, num_replicas=-1)
    with pytest.raises(PlanError, match="of 4 experts and the history of 2"):
        measure(round_robin(4, 2), [[1, 2]])
