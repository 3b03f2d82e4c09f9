"""An executor of several ranks: what this process runs, the others run too."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from hotset.executor.executor import Pending
from hotset.executor.lanes import align
from hotset.executor.local import LocalExecutor
from hotset.executor.step_input import StepInput, StepResult
from hotset.experts.recorder import RoutingRecorder
from hotset.metrics import ExpertCounts, HotCounts
from hotset.parallel.collectives import broadcast
from hotset.ranks.driver import Ranks
from hotset.ranks.log import Op, StepWriter, command
from hotset.ranks.messages import START_TIMEOUT_S, Counted, RankReport
from hotset.request import SamplingParams


class RankedExecutor:
    """See `Executor`. Tokens are chosen here, and go to the other ranks on the device.

    Any failure of a rank ends the engine, with EngineError or with its process.

    Args:
        local: rank 0's.
        ranks: the others, which have built theirs.
        scratch_block: of each rank; no request gets it.
        owns_ranks: whether they end with this.
    """

    def __init__(
        self, local: LocalExecutor, ranks: Ranks, *, scratch_block: int, owns_ranks: bool
    ) -> None:
        self.local, self._ranks, self._owns_ranks = local, ranks, owns_ranks
        self._scratch_block = scratch_block
        self._writer = StepWriter()
        self._released: list[int] = []
        self._lock = threading.Lock()
        # What experts did on each rank, by the number of a COUNT; by _lock.
        self._counts: dict[int, dict[int, ExpertCounts]] = {}
        self._number = 0

    @property
    def vocab_size(self) -> int:
        """See `Executor`."""
        return self.local.vocab_size

    @property
    def is_warming(self) -> bool:
        """See `Executor`."""
        return self.local.is_warming

    def validate(self, params: SamplingParams, answers: Sequence[Sequence[int]] = ()) -> None:
        """See `Executor`."""
        self.local.validate(params, answers)

    def submit(
        self, steps: Sequence[StepInput], when_ready: Callable[[], None] = lambda: None
    ) -> "RankedStep":
        """See `Executor`."""
        released, self._released = self._released, []
        commands = [self._writer.release(released)] if released else []
        if len(steps) > 1:
            holds = self.local.runner.holds
            steps = align(steps, scratch_block=self._scratch_block, holds=holds)
        # Each rank gets its lane's, or all get that of the only one.
        of_others = steps[1:] or steps
        with self._ranks.step([[*commands, self._writer.step(step)] for step in of_others]):
            pending = self.local.submit(steps, when_ready)
            if self.local.chosen is not None:
                broadcast(self.local.chosen)
        return RankedStep(pending, self._ranks)

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """See `Executor`."""
        for number, own in enumerate(copies[1:] or copies, start=1):
            if own:
                ranks = [number] if len(copies) > 1 else None
                self._ranks.send(command(Op.COPY_BLOCKS, *own), ranks=ranks)
        if copies[0]:
            self.local.copy_blocks(copies)

    def release(self, sequence_id: int) -> None:
        """See `Executor`."""
        self._released.append(sequence_id)
        self.local.release(sequence_id)

    def warm_up(self) -> bool:
        """See `Executor`."""
        self._ranks.send(command(Op.WARM_UP))
        with self._ranks.waiting(START_TIMEOUT_S):  # layers may be compiled
            return self.local.warm_up()

    def expert_counts(self) -> ExpertCounts | None:
        """See `Executor`. What the other ranks did is compared with it when they report it."""
        self._number += 1
        self._ranks.send(command(Op.COUNT, [self._number]))
        with self._ranks.waiting():
            counts = self.local.expert_counts()
        self._compare(0, self._number, counts)
        return counts

    def take(self, rank: int, report: RankReport) -> None:
        """Take note of what the experts of another rank did."""
        if isinstance(report, Counted):
            self._compare(rank, report.number, report.counts)

    def _compare(self, rank: int, number: int, counts: ExpertCounts | None) -> None:
        """End the engine where a rank used other experts: all route alike, or outputs are wrong."""
        if counts is None:
            return
        with self._lock:
            by_rank = self._counts.setdefault(number, {})
            by_rank[rank] = counts
            if len(by_rank) < self._ranks.size:
                return
            del self._counts[number]
        for rank in range(1, self._ranks.size):
            used = [(one.expert_hits, one.expert_misses) for one in (by_rank[0], by_rank[rank])]
            if used[0] == used[1]:
                continue
            self._ranks.fail(
                rank,
                "it used other experts than rank 0: {1[0]:,} hits and {1[1]:,} misses, rank 0 "
                "{0[0]:,} and {0[1]:,}".format(*used),
            )

    def hot_counts(self) -> HotCounts | None:
        """See `Executor`."""
        return self.local.hot_counts()

    def take_faults(self) -> Counter[str]:
        """See `Executor`."""
        return self.local.take_faults()

    def record_routing(self, recorder: RoutingRecorder | None) -> None:
        """See `Executor`. Rank 0's routing is all ranks'."""
        self.local.record_routing(recorder)

    def close(self) -> None:
        """See `Executor`. The other ranks end, or are ready for another engine."""
        self._ranks.end()
        self.local.close()
        if self._owns_ranks:
            self._ranks.close()


class RankedStep:
    """See `Pending`."""

    def __init__(self, pending: Pending, ranks: Ranks) -> None:
        self._pending, self._ranks = pending, ranks

    def wait(self) -> StepResult:
        """See `Pending`."""
        with self._ranks.waiting():
            return self._pending.wait()
