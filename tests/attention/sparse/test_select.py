"""The reference of scoring and selecting, against the words of their docstrings."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hotset.attention.sparse.select import score_keys, select_positions


def test_a_score_is_the_weighted_sum_of_the_products_that_are_positive() -> None:
    query = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    weights = torch.tensor([[0.5, -3.0]])
    keys = torch.tensor([[4.0, 1.0], [-4.0, 1.0], [4.0, -1.0], [-1.0, -1.0]])

    scores = score_keys(query, weights, keys)

    assert scores.tolist() == [[2.0 - 6.0, -6.0, 2.0, 0.0]]


def test_no_score_is_a_negative_zero() -> None:
    scores = score_keys(torch.ones(1, 1, 2), torch.tensor([[-1.0]]), -torch.ones(3, 2))

    assert not scores.any()
    assert not scores.signbit().any()


def test_of_equal_scores_the_lower_position_is_selected() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0]])

    assert select_positions(scores, torch.tensor([5]), 3).tolist() == [[0, 1, 4]]
    assert select_positions(torch.zeros(1, 5), torch.tensor([5]), 3).tolist() == [[0, 1, 2]]


def test_scores_beyond_the_length_do_not_count() -> None:
    scores = torch.tensor([[1.0, 2.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]])

    selected = select_positions(scores, torch.tensor([2, 4]), 3)

    assert selected.tolist() == [[0, 1, -1], [1, 2, 3]]
    assert selected.dtype == torch.int32


def test_fewer_keys_than_are_selected_are_all_selected() -> None:
    assert select_positions(torch.zeros(1, 2), torch.tensor([2]), 4).tolist() == [[0, 1, -1, -1]]


def test_a_score_of_minus_infinity_comes_before_what_is_beyond_the_length() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, 5.0]])

    assert select_positions(scores, torch.tensor([2]), 2).tolist() == [[0, 1]]


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4),
    st.integers(1, 12),
    st.data(),
)
def test_a_selection_is_what_sorting_by_score_and_position_gives(
    rows: list[list[int]], count: int, data: st.DataObject
) -> None:
    lengths = [data.draw(st.integers(1, 9)) for _ in rows]

    selected = select_positions(
        torch.tensor(rows, dtype=torch.float32), torch.tensor(lengths), count
    )

    for row, length, found in zip(rows, lengths, selected.tolist(), strict=True):
        best = sorted(range(length), key=lambda at: (-row[at], at))[:count]
        assert found == sorted(best) + [-1] * (count - len(best))
