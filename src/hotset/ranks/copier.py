"""A copier of several ranks: each copies its part of a block to its part of a host slot."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hotset.errors import EngineError
from hotset.memory.copy_runs import Run
from hotset.memory.device_payloads import DevicePayloads
from hotset.memory.mover import Copier, HostMemory
from hotset.ranks.driver import Ranks
from hotset.ranks.log import Array, Op, command
from hotset.ranks.memory import RanksMemory
from hotset.ranks.messages import Copied, RankReport

_LOOK_EVERY_S = 0.1


class FarSlots:
    """Host slots of other ranks alone: they have numbers here, and no bytes.

    Implements `mover.HostMemory`.
    """

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes

    def view(self, slot: int) -> memoryview:
        """What only the other rank has."""
        raise AssertionError(f"host slot {slot} is in another process")

    def address(self, slot: int) -> int:
        """A place from the start of all slots."""
        return slot * self.slot_bytes


@dataclass(frozen=True, slots=True)
class FarHost:
    """Host memory of another rank, and what has it copy."""

    arena: FarSlots
    copier: "RanksCopier"


class RanksCopier:
    """See `mover.Copier`. A copy has ended once it has on all ranks, and took what the slowest did.

    Runs are sent as places in the device's memories and from the start of host memory, which are
    the same on all ranks.

    Args:
        local: rank 0's; None where it takes no part.
        ranks: have the others, `others` of which take part.
        device: rank 0's blocks and states, of the same size on all.
        host: rank 0's host slots, likewise, or the places of those of others.
        memory: is told of each copy to the device.
    """

    def __init__(
        self,
        local: Copier | None,
        ranks: Ranks,
        device: DevicePayloads,
        host: HostMemory,
        memory: RanksMemory,
        *,
        others: Sequence[int],
    ) -> None:
        self._local, self._ranks, self._others = local, ranks, others
        self._device, self._host, self._memory = device, host, memory
        self._up_bytes: dict[int, int] = {}  # by id, of copies to the device; by _changed
        self._changed = threading.Condition()
        self._number = 0  # of copies that rank 0 does not make
        self._open: dict[int, dict[int, float]] = {}  # by id, seconds by rank; by _changed
        self._ready = dict.fromkeys(others, 0)  # slots by rank; by _changed
        self._num_parts = len(others) + (local is not None)

    @property
    def num_ready_slots(self) -> int:
        """Of the rank that has the fewest."""
        here = [] if self._local is None else [self._local.num_ready_slots]
        return min([*here, *self._ready.values()])

    def wait_ready(self) -> None:
        """Block until all ranks have some host slots.

        Raises:
            EngineError: a rank has failed.
        """
        with self._ranks.waiting():
            while not self.num_ready_slots:
                with self._changed:
                    self._changed.wait(_LOOK_EVERY_S)
                if self._ranks.failure is not None:
                    raise EngineError(self._ranks.failure)

    def mark(self) -> None:
        """See `mover.Copier`. Within a step the other ranks do so by themselves."""
        if not self._ranks.is_in_step:
            self._send(command(Op.MARK))
        if self._local is not None:
            self._local.mark()

    def submit(self, runs: Sequence[Run], *, to_host: bool) -> int:
        """See `mover.Copier`."""
        if self._local is None:
            copy_id = self._number = self._number + 1
        else:
            copy_id = self._local.submit(runs, to_host=to_host)
        with self._changed:
            self._open[copy_id] = {}
            if not to_host:
                self._up_bytes[copy_id] = sum(run.num_bytes for run in runs)
        places = self._device.places(np.array(runs, np.int64).reshape(-1, 3))
        places[:, 1] -= self._host.address(0)
        self._send(command(Op.COPY, (copy_id, to_host), places))
        return copy_id

    def order(self, copy_id: int) -> bool:
        """See `mover.Copier`. Each device waits for its own copy."""
        can_wait = self._device.memories[0].is_cuda
        if self._local is not None:
            can_wait = self._local.order(copy_id)
        if can_wait:
            self._send(command(Op.ORDER, [copy_id]))
        return can_wait

    def poll(self) -> list[tuple[int, float]]:
        """See `mover.Copier`."""
        with self._changed:
            self._poll_local()
            ended = [
                (copy_id, max(seconds.values()))
                for copy_id, seconds in self._open.items()
                if len(seconds) == self._num_parts
            ]
            for copy_id, _ in ended:
                del self._open[copy_id]
                self._up_bytes.pop(copy_id, None)
        return ended

    def wait(self, timeout_s: float) -> None:
        """See `mover.Copier`."""
        deadline_s = time.monotonic() + timeout_s
        is_missing = any(0 not in seconds for seconds in list(self._open.values()))
        if self._local is not None and is_missing:
            self._local.wait(timeout_s)
        with self._changed:
            self._poll_local()
            self._changed.wait_for(
                lambda: any(len(s) == self._num_parts for s in self._open.values()),
                max(0.0, deadline_s - time.monotonic()),
            )

    def close(self) -> None:
        """See `mover.Copier`. The other ranks close theirs when the engine ends."""
        if self._local is not None:
            self._local.close()

    def take(self, rank: int, report: RankReport) -> None:
        """Take note of what ended on another rank."""
        if isinstance(report, Copied) and rank in self._ready:
            with self._changed:
                self._ready[rank] = report.num_ready_slots
                self._note(rank, report.ended)
                self._changed.notify_all()

    def _send(self, one: Array) -> None:
        self._ranks.send(one, ranks=self._others)

    def _poll_local(self) -> None:
        if self._local is not None:
            self._note(0, self._local.poll())

    def _note(self, rank: int, ended: list[tuple[int, float]]) -> None:
        for copy_id, seconds in ended:
            self._open[copy_id][rank] = seconds
            if num_bytes := self._up_bytes.get(copy_id):
                self._memory.note_copy(rank, num_bytes, seconds)
