"""What a rank runs steps with, and how it replays the commands of the driver."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from hotset.executor.local import warm_up
from hotset.executor.runner import ModelRunner
from hotset.experts.buffer import ExpertBuffer
from hotset.memory.arena import HostArena
from hotset.memory.copy_runs import Run
from hotset.memory.device_payloads import DevicePayloads
from hotset.memory.mover import Copier
from hotset.parallel.collectives import broadcast
from hotset.parallel.tokens import collect_rows
from hotset.ranks.log import Array, Op, StepReader, commands, key_of
from hotset.ranks.memory import Meter
from hotset.ranks.messages import Copied, Counted, Failed, Held, Moved, RankReport, Stepped
from hotset.ranks.slab_files import RankSlab

_DISK_THREADS = 4


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank that is ready to replay.

    Attributes:
        runner: of this rank's part of the model.
        payloads: this rank's part of each block, and of each state.
        experts: this rank's slices; None where they stay on the device as they were loaded.
        host, copier: this rank's part of each host slot; None where there is no host memory.
        slab: and of each slot on disk; None where there is none.
        facts: that have to be equal on all ranks.
        meter: of its memory.
    """

    runner: ModelRunner
    payloads: DevicePayloads
    experts: ExpertBuffer | None
    host: HostArena | None
    copier: Copier | None
    slab: RankSlab | None
    facts: dict[str, str]
    meter: Meter


class Replay:
    """Replays commands on a rank.

    Args:
        rank: that runs them.
        report: sends a report to the driver; any thread calls it.
    """

    def __init__(self, rank: Rank, report: Callable[[RankReport], None]) -> None:
        self._rank, self._report = rank, report
        self._reader = StepReader()
        self._chosen: torch.Tensor | None = None  # what the last step chose, on the device
        self._num_steps = 0
        self._copies: dict[int, int] = {}  # by the copier's id, the driver's
        self._num_ready = -1
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "rank-disk")

    @property
    def is_copying(self) -> bool:
        """Whether copies are under way, or host memory is still being taken; see `poll`."""
        copier, host = self._rank.copier, self._rank.host
        if copier is None or host is None:
            return False
        return bool(self._copies) or copier.num_ready_slots < len(host.slots)

    def poll(self) -> None:
        """Report copies that have ended."""
        copier = self._rank.copier
        if copier is None:
            return
        ended = [(self._copies.pop(copy_id), s) for copy_id, s in copier.poll()]
        if ended or copier.num_ready_slots != self._num_ready:
            self._num_ready = copier.num_ready_slots
            self._report(Copied(ended, self._num_ready))

    def run(self, message: bytes) -> bool:
        """Run the commands of a message; returns False at the end."""
        for op, numbers in commands(message):
            if op is Op.END:
                self._close()
                return False
            self._run(op, numbers)
        return True

    def _run(self, op: Op, numbers: Array) -> None:
        rank, copier = self._rank, self._rank.copier
        if op is Op.STEP:
            self._step(numbers)
        elif op is Op.COPY_BLOCKS:
            rank.runner.copy_blocks([(a, b) for a, b in numbers.reshape(-1, 2).tolist()])
        elif op is Op.RELEASE:
            self._reader.release(numbers)
        elif op is Op.WARM_UP:
            warm_up(rank.runner, rank.experts)
        elif op is Op.COUNT:
            counts = None if rank.experts is None else rank.experts.counts()
            self._report(Counted(int(numbers[0]), counts))
            self._report(Held(rank.meter.read()))
        elif op in (Op.WRITE, Op.READ):
            assert rank.slab is not None and rank.host is not None
            number, host_slot, slot = numbers[:3].tolist()
            key, view = key_of(numbers[3:]), rank.host.view(host_slot)
            move = rank.slab.write if op is Op.WRITE else rank.slab.read
            self._disk.submit(self._move, lambda: move(number, slot, key, view))
        else:
            assert copier is not None
            if op is Op.MARK:
                copier.mark()
            elif op is Op.COPY:
                self._copy(copier, numbers)
            else:
                assert op is Op.ORDER
                theirs = {ours: own for own, ours in self._copies.items()}
                if (copy_id := theirs.get(int(numbers[0]))) is not None:
                    copier.order(copy_id)

    def _step(self, numbers: Array) -> None:
        """Compute a step, and get the tokens that rank 0 chooses."""
        step, runner = self._reader.step(numbers), self._rank.runner
        copier = self._rank.copier
        previous, self._chosen = self._chosen, None
        when_ready = copier.mark if copier else lambda: None
        logits = runner.forward(step, previous, when_ready)
        num_chosen = len(step.batch.sampled_rows)
        if (together := step.together) is not None:
            num_chosen = together.num_chosen
            if together.num_rows:
                collect_rows(logits, together.num_rows)
        if num_chosen:
            self._chosen = torch.empty(num_chosen, dtype=torch.int64, device=runner.device)
            broadcast(self._chosen)
        self._num_steps += 1
        self._report(Stepped(self._num_steps))

    def _move(self, move: Callable[[], Moved]) -> None:
        report: RankReport
        try:
            report = move()
        except Exception as error:  # a bug, as the driver waits for an answer
            report = Failed.of(error)
        self._report(report)

    def _copy(self, copier: Copier, numbers: Array) -> None:
        assert self._rank.host is not None
        copy_id, to_host = numbers[:2].tolist()
        places = numbers[2:].reshape(-1, 3).copy()
        places[:, 0] = self._rank.payloads.addresses(places[:, 0])
        places[:, 1] += self._rank.host.address(0)
        runs = [Run(*run) for run in places.tolist()]
        self._copies[copier.submit(runs, to_host=bool(to_host))] = copy_id

    def _close(self) -> None:
        rank = self._rank
        self._disk.shutdown()
        rank.runner.close()
        if rank.copier is not None:
            rank.copier.close()
        if rank.slab is not None:
            rank.slab.close()
        if rank.experts is not None:
            rank.experts.close()
