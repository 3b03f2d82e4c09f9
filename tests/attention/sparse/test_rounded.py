"""Index keys in 8 bits: how they are turned and rounded, written anew here."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounded_scores import hadamard

from hotset.attention.sparse.rounded import (
    check_width,
    round_keys,
    store_keys,
    turn,
    turned_query,
    widen_keys,
)
from hotset.attention.sparse.select import score_keys
from hotset.errors import ConfigError
from hotset.linear.fp8 import FP8


def nearest_e4m3(value: float) -> float:
    """The float with 3 bits of mantissa nearest to a number of at most 448; of two the even one."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, -6) - 3)
    return round(value / step) * step  # Python rounds halves to even


def rounded(turned: list[float]) -> tuple[list[float], float]:
    """The numbers of a stored key and its scale, by the words of `round_keys`."""
    largest = max(1e-4, *(abs(value) for value in turned))
    exponent = -40
    while 448 * 2.0**exponent < largest:
        exponent += 1
    scale = 2.0**exponent
    return [nearest_e4m3(value / scale) for value in turned], scale


@pytest.mark.parametrize("width", [16, 128])
def test_turning_is_a_hadamard_transform(width: int) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn(x).double(), x.double() @ hadamard(width), rtol=0, atol=1e-5)


def test_turned_queries_score_turned_keys_as_they_did_before() -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randint(-3, 4, (4, 8, 128), generator=random).float()  # so that sums are exact
    keys = torch.randint(-3, 4, (50, 128), generator=random).float()
    weights = torch.randn(4, 8, generator=random)

    scores = score_keys(turned_query(query), weights, turn(keys))

    torch.testing.assert_close(scores, score_keys(query, weights, keys))
    assert turned_query(query.bfloat16()).dtype == torch.bfloat16


@given(
    st.lists(
        st.one_of(
            st.floats(-1e4, 1e4, allow_subnormal=False),
            st.sampled_from([448.0, -448.0, 448.00003, 1e-4, 0.875, 15.0, 464.0]),
            st.floats(-1e-3, 1e-3, allow_subnormal=False),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_numbers_are_the_nearest_and_the_scale_is_the_least_power_of_two(key: list[float]) -> None:
    keys, scales = round_keys(torch.tensor([key]))
    assert keys.dtype == FP8 and scales.dtype == torch.float32
    expected, scale = rounded(torch.tensor(key).tolist())
    assert scales.tolist() == [scale]
    assert keys.float().tolist() == [expected]


def test_what_is_no_number_stays_so() -> None:
    keys, _ = round_keys(torch.tensor([[1.0, math.nan], [2.0, 3.0]]))
    assert keys.float().isnan().any(1).tolist() == [True, False]


def test_keys_are_stored_where_they_belong_and_widened_in_the_order_asked_for() -> None:
    memory = torch.zeros(5, 4 * 16 + 16 + 8, dtype=torch.uint8)  # as in a block of the arena
    keys = memory[:, :64].view(FP8).view(5, 4, 16)
    scales = memory[:, 64:80].view(torch.float32)
    key = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([4, 0, 4]), torch.tensor([1, 3, 0])

    store_keys(key, keys, scales, places)

    assert int((memory.sum(1) > 0).sum()) == 2 and not memory[:, 80:].any()
    found = widen_keys(keys, scales, torch.tensor([0, 4]))
    assert found.shape == (2, 4, 16)
    values, scale = round_keys(turn(key))
    wide = values.float() * scale.unsqueeze(1)
    assert torch.equal(found[[1, 0, 1], [1, 3, 0]], wide)
    assert not found[0, :3].any() and not found[1, 2:].any()
    assert (wide - turn(key)).abs().max() < turn(key).abs().max() / 16


@pytest.mark.parametrize("width", [8, 24, 96])
def test_widths_that_cannot_be_turned_are_refused(width: int) -> None:
    with pytest.raises(ConfigError, match=f"index keys of {width} numbers .* expected auto"):
        check_width(width)
