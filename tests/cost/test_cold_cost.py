"""What is copied, what the CPU computes, and when that pays."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.cost.cold_experts import MOST_TOKENS, ColdCost

# Of an expert of 9.4 MB: a link of 50 GB/s, and a CPU that reads 100 GB/s.
COST = ColdCost(copy_s=190e-6, cpu_s=((1, 95e-6), (4, 120e-6), (16, 400e-6)), layer_s=300e-6)


def test_seconds_of_rows_between_and_beyond_what_was_measured() -> None:
    assert COST.cpu_seconds(0.5) == COST.cpu_seconds(1) == 95e-6
    assert COST.cpu_seconds(4) == pytest.approx(120e-6)
    assert COST.cpu_seconds(10) == pytest.approx(260e-6)
    assert COST.cpu_seconds(28) == pytest.approx(680e-6)
    assert ColdCost(1.0, ((1, 2.0),), 0.0).cpu_seconds(9) == 2.0


@given(st.lists(st.integers(1, 20), max_size=12))
def test_the_split_is_the_soonest_done(rows: list[int]) -> None:
    rows.sort(reverse=True)
    ways = [
        max(number * COST.copy_s, sum(COST.cpu_seconds(count) for count in rows[number:]))
        for number in range(len(rows) + 1)
    ]
    assert COST.seconds(rows) == pytest.approx(min(ways))


def test_link_and_cpu_end_together() -> None:
    # 30 experts of one row: 10 over the link take as long as 20 on the CPU.
    assert COST.num_copied([1] * 30) == 10
    assert COST.num_copied([]) == 0
    assert ColdCost(1e-6, ((1, 1.0),), 0.0).num_copied([1] * 30) == 30


def test_it_pays_for_small_steps_with_enough_cold_experts() -> None:
    shape = {"top_k": 8, "num_experts": 128, "num_slots": 42}
    assert COST.pays(1, **shape)  # 5 cold: 950 us over the link, 380 and 300 so
    assert COST.pays(16, **shape)
    assert not COST.pays(MOST_TOKENS + 1, **shape)
    assert not COST.pays(1, top_k=8, num_experts=128, num_slots=128)  # nothing is cold
    assert not COST.pays(1, top_k=8, num_experts=128, num_slots=110)  # one is
    slow = ColdCost(190e-6, ((1, 5e-3), (16, 9e-3)), 300e-6)
    assert not any(slow.pays(count, **shape) for count in range(1, MOST_TOKENS + 1))


def test_the_slower_the_cpu_the_fewer_steps_it_takes() -> None:
    def taken(factor: float) -> int:
        points = tuple((rows, factor * seconds) for rows, seconds in COST.cpu_s)
        cost = ColdCost(COST.copy_s, points, COST.layer_s)
        return sum(
            cost.pays(count, top_k=8, num_experts=128, num_slots=42)
            for count in range(1, MOST_TOKENS + 1)
        )

    counts = [taken(factor) for factor in (0.5, 1, 2, 4, 8, 16)]
    assert all(one >= other for one, other in itertools.pairwise(counts))
    assert counts[0] > counts[-1]
