"""How unevenly experts are used: what a skewed router comes to, and how use is measured."""

import math

import pytest

from hotset.cost.routing import Routing, row_scales, skew_of, skewed_shares


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (64, 8), (8, 2), (256, 8), (4, 4)])
@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0])
def test_shares_are_a_distribution_that_no_expert_exceeds_its_part_of(
    num_experts: int, top_k: int, skew: float
) -> None:
    shares = skewed_shares(num_experts, top_k, skew)
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) <= 1 / top_k + 1e-9  # a token takes an expert once at most
    Routing(shares).check(num_experts)
    if skew == 0:
        assert shares == pytest.approx([1 / num_experts] * num_experts)


def test_more_skew_is_more_uneven() -> None:
    found = [skew_of([skewed_shares(128, 8, skew)]) for skew in (0.0, 0.2, 0.45, 0.6)]
    assert [round(skew.max_over_mean, 2) for skew in found] == [1.0, 2.84, 4.77, 5.56]
    assert [round(skew.top_quarter, 2) for skew in found] == [0.25, 0.44, 0.64, 0.72]


def test_the_skew_named_in_the_docs_is_that_of_a_published_measurement() -> None:
    """Qwen3-30B-A3B on mixed text: 65 of 128 experts get 90 %, 1 - normalised entropy is 0.111."""
    shares = skewed_shares(128, 8, 0.45)
    entropy = -sum(share * math.log(share) for share in shares if share) / math.log(128)
    assert 1 - entropy == pytest.approx(0.111, abs=0.005)
    assert skew_of([shares]).for_90_percent == pytest.approx(65 / 128, abs=0.02)
    assert max(shares) == pytest.approx(0.043, abs=0.007)


def test_row_scales_have_the_deviation_asked_for() -> None:
    logs = [math.log(scale) for scale in row_scales(1000, 0.5)]
    assert sum(logs) == pytest.approx(0.0, abs=1e-9)
    assert math.sqrt(sum(x * x for x in logs) / 1000) == pytest.approx(0.5, rel=0.01)


def test_use_is_measured_by_layer_and_averaged() -> None:
    even, one = [5, 5, 5, 5], [0, 8, 0, 0]
    assert skew_of([even]).max_over_mean == 1.0
    assert skew_of([even]).for_90_percent == 1.0
    both = skew_of([even, one, [0, 0, 0, 0]])
    assert (both.max_over_mean, both.top_quarter) == (2.5, 0.625)
    assert both.for_90_percent == pytest.approx((1 + 0.25) / 2)
    assert "2.50 times the mean" in str(both) and "quarter 62%" in str(both)
