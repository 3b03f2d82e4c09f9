"""Which recorded size runs a step, while sizes are recorded and after."""

from hotset.executor.recorded_sizes import RecordedSizes


def test_the_largest_size_comes_first_then_the_smallest_then_the_others() -> None:
    assert RecordedSizes([1, 2, 4, 8]).missing == [8, 1, 4, 2]
    assert RecordedSizes([5, 9]).missing == [9, 5]
    assert RecordedSizes([3]).missing == [3]


def test_a_step_waits_for_a_size_that_is_not_mostly_padding() -> None:
    sizes = RecordedSizes([1, 2, 4, 8, 16])
    assert sizes.find(1) is None
    sizes.add(16, 5.0)
    assert [sizes.find(rows) for rows in (1, 3, 4, 16, 17)] == [None, None, 16, 16, None]
    sizes.add(1, 1.0)
    sizes.add(8, 3.0)
    assert [sizes.find(rows) for rows in (1, 2, 8, 9)] == [1, 8, 8, 16]


def test_once_all_are_there_the_fastest_that_holds_a_step_runs_it() -> None:
    sizes = RecordedSizes([2, 4, 6])
    for size, seconds in ((6, 2.0), (2, 1.0), (4, 3.0)):
        sizes.add(size, seconds)
    assert not sizes.missing
    assert [sizes.find(rows) for rows in (1, 2, 3, 6, 7)] == [2, 2, 6, 6, None]
