"""How long layers wait for rows that come one after another."""

import pytest

from hotset.cost.row_link import GroupRows, waiting_s


def test_a_layer_that_selects_waits_for_its_own_rows() -> None:
    groups = [GroupRows([5.0], 2.0), GroupRows([1.0], 3.0)]
    assert waiting_s(groups) == 5 == sum(group.link_s for group in groups)


@pytest.mark.parametrize(
    ("layers_s", "expected"),
    [
        ([4.0, 1.0, 1.0], 2.0),  # the first layer computes until all have come
        ([3.0, 1.0, 1.0], 2.0),
        ([2.0, 3.0, 1.0], 2.0),
        ([0.0, 0.0, 9.0], 6.0),  # layers that take no time hide nothing, what comes after neither
        ([1.0, 1.0, 9.0], 4.0),
    ],
)
def test_rows_of_later_layers_come_while_layers_before_them_compute(
    layers_s: list[float], expected: float
) -> None:
    group = GroupRows(layers_s, 2.0, {1: 1.0, 2: 3.0})
    assert group.link_s == 6 and waiting_s([group]) == expected


@pytest.mark.parametrize(
    ("layer_s", "expected"),
    [
        (4.0, 2.0 + 0.5),  # all that was guessed has come: half of a second is waited for
        (3.0, 2.0 + 0.5),
        (1.0, 2.0 + 2.0 + 0.5),  # the rest of the guess comes first
        (0.0, 2.0 + 3.0 + 0.5),
    ],
)
def test_a_guess_comes_while_its_own_group_computes(layer_s: float, expected: float) -> None:
    groups = [GroupRows([layer_s], 2.0, guessed_s=3.0), GroupRows([7.0], 0.5)]
    assert waiting_s(groups) == expected


def test_a_guess_is_scored_while_rows_come_that_are_waited_for() -> None:
    def group(scoring_s: float) -> list[GroupRows]:
        return [GroupRows([9.0], 2.0, scoring_s=scoring_s, guessed_s=3.0), GroupRows([9.0], 1.0)]

    assert [waiting_s(group(scoring_s)) for scoring_s in (0.0, 0.5, 5.0)] == [3.0, 2.5, 1.0]


def test_a_guess_comes_behind_the_rows_of_layers_that_share_the_selection() -> None:
    groups = [GroupRows([1.0, 4.0], 2.0, {1: 2.0}, guessed_s=5.0), GroupRows([9.0], 1.0)]
    # 2, then 1 of 2, then the guess begins at 4 and ends at 9, while the layers end at 8.
    assert waiting_s(groups) == 2 + 1 + 1 + 1
