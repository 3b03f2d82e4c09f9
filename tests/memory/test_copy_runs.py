from hypothesis import given
from hypothesis import strategies as st

from hotset.memory.copy_runs import merge_runs


def test_adjacent_blocks_in_adjacent_slots_are_one_copy() -> None:
    assert merge_runs([(4, 1), (3, 0), (9, 2), (5, 7)]) == [(3, 0, 2), (5, 7, 1), (9, 2, 1)]


def test_a_copy_does_not_cross_from_one_chunk_of_pinned_memory_into_the_next() -> None:
    pairs = [(block, block) for block in range(2, 9)]
    assert merge_runs(pairs, slots_per_chunk=4) == [(2, 2, 2), (4, 4, 4), (8, 8, 1)]


@given(
    st.dictionaries(st.integers(0, 40), st.integers(0, 40)).filter(
        lambda d: len(set(d.values())) == len(d)
    )
)
def test_runs_cover_each_pair_once(pairs: dict[int, int]) -> None:
    merged = merge_runs(list(pairs.items()))
    covered = [(b + i, s + i) for b, s, count in merged for i in range(count)]
    assert sorted(covered) == sorted(pairs.items())
