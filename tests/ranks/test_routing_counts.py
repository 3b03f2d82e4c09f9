"""What experts did is compared between ranks, in whatever order it is told."""

import contextlib
from collections.abc import Iterator

import pytest

from hotset.metrics import ExpertCounts
from hotset.ranks.executor import RankedExecutor
from hotset.ranks.messages import Counted

OURS = ExpertCounts(expert_hits=7, expert_misses=3)


class ThreeRanks:
    """What an executor needs of `Ranks`: sends go nowhere, failures are noted."""

    size = 3

    def __init__(self) -> None:
        self.failed: list[tuple[int, str]] = []

    def send(self, *commands: object) -> None:
        pass

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        yield

    def fail(self, rank: int, line: str) -> None:
        self.failed.append((rank, line))


class Local:
    def expert_counts(self) -> ExpertCounts:
        return OURS


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("hits", [7, 6])
def test_a_rank_that_used_other_experts_ends_the_engine(is_early: bool, hits: int) -> None:
    ranks = ThreeRanks()
    executor = RankedExecutor(Local(), ranks, scratch_block=0, owns_ranks=False)  # type: ignore[arg-type]
    theirs = [Counted(1, OURS), Counted(1, ExpertCounts(expert_hits=hits, expert_misses=10 - hits))]
    if not is_early:
        executor.expert_counts()
    for rank, counted in enumerate(theirs, start=1):
        executor.take(rank, counted)
    if is_early:
        executor.expert_counts()
    line = "it used other experts than rank 0: 6 hits and 4 misses, rank 0 7 and 3"
    assert ranks.failed == ([] if hits == 7 else [(2, line)])
