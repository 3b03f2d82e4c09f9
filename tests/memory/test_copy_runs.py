from hypothesis import given
from hypothesis import strategies as st

from hotset.memory.copy_runs import Run, merge_runs


def blocks(pairs: list[tuple[int, int]]) -> list[Run]:
    """Runs of 10 bytes: block b at 1000 + 10 b, slot s at 5000 + 10 s."""
    return [Run(1000 + 10 * block, 5000 + 10 * slot, 10) for block, slot in pairs]


def merged(pairs: list[tuple[int, int]], slots_per_chunk: int | None = None) -> list[Run]:
    chunk_bytes = None if slots_per_chunk is None else 10 * slots_per_chunk
    return merge_runs(blocks(pairs), host_start=5000, chunk_bytes=chunk_bytes)


def runs(*triples: tuple[int, int, int]) -> list[Run]:
    return [Run(1000 + 10 * b, 5000 + 10 * s, 10 * count) for b, s, count in triples]


def test_adjacent_blocks_in_adjacent_slots_are_one_copy() -> None:
    assert merged([(4, 1), (3, 0), (9, 2), (5, 7)]) == runs((3, 0, 2), (5, 7, 1), (9, 2, 1))


def test_a_copy_does_not_cross_from_one_chunk_of_pinned_memory_into_the_next() -> None:
    pairs = [(block, block) for block in range(2, 9)]
    assert merged(pairs, slots_per_chunk=4) == runs((2, 2, 2), (4, 4, 4), (8, 8, 1))


def test_blocks_in_slots_wider_than_they_are_stay_copies_of_their_own() -> None:
    apart = [Run(10 * block, 16 * block, 10) for block in range(3)]
    assert merge_runs(apart, chunk_bytes=160) == apart


@given(
    st.dictionaries(st.integers(0, 40), st.integers(0, 40)).filter(
        lambda d: len(set(d.values())) == len(d)
    ),
    st.sampled_from([None, 1, 4]),
)
def test_runs_cover_each_pair_once(pairs: dict[int, int], slots_per_chunk: int | None) -> None:
    covered = [
        (run.device + i, run.host + i)
        for run in merged(list(pairs.items()), slots_per_chunk)
        for i in range(run.num_bytes)
    ]
    expected = [
        (run.device + i, run.host + i) for run in blocks(list(pairs.items())) for i in range(10)
    ]
    assert sorted(covered) == sorted(expected)
