"""Experts below host memory: all in one file, and in host slots those that it has room for."""

import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from hotset.errors import ExpertReadError, TierError
from hotset.experts.host import ExpertLayout, HostRows
from hotset.memory.disk.io_queue import IoQueue, Job, Mailbox
from hotset.memory.disk.slab import FolderLock, Slab, checksum

FILE = "experts.slab"
FEWEST_SLOTS = 2  # one is read into while the other is used

_NUM_THREADS = 4
_MOST_IN_TRANSIT = 16
_CLOSE_S = 5.0
_LATE = "expert_disk_late"


class Event(Protocol):
    """The end of something that reads a slot, such as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it has ended."""
        ...

    def synchronize(self) -> None:
        """Wait for its end."""
        ...


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """What a store did so far.

    Attributes:
        host_hits: experts that were taken and were in host memory.
        reads: experts that were read from disk; some were not needed after all.
        read_bytes: bytes of these.
        wait_s: how long steps waited for the disk.
    """

    host_hits: int = 0
    reads: int = 0
    read_bytes: int = 0
    wait_s: float = 0.0


class ExpertStore:
    """The experts of all layers of a model on disk, and a bounded number of them in host memory.

    The file has a fixed place for each expert, is written once by `write_layer`, and goes with
    `close`. What is read must match the checksum that was taken when it was written.

    Host slots are of two kinds, and change from one to the other without a copy. Each layer keeps
    an equal share of them; a few are in transit between the disk and the computing layer. A step
    says layer by layer what it needs (`expect`), which starts reads in that order as far as slots
    are free, and then takes one after the other. An expert that was read stays if its layer has
    room, or in the place of one that this step did not take, the first that came before others
    (least stale, as `SlotTable` has it); else its slot is free for the next read.

    Bookkeeping is done in the caller's thread; workers only read, write and sum.

    Args:
        folder: created where missing. One process at a time.
        layout: of each expert.
        num_layers: L.
        num_experts: E, of each layer.
        num_slots: of host memory; `FEWEST_SLOTS` or more.
        read_deadline_s: the longest a step waits for one expert.

    Attributes:
        rows: the host slots.
        host_bytes: of all slots.
        disk_bytes: of the file.
        faults: what went wrong, by kind.

    Raises:
        TierError: no space, in use, or not writable.
    """

    def __init__(
        self,
        folder: Path,
        layout: ExpertLayout,
        *,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        read_deadline_s: float,
    ) -> None:
        assert num_slots >= FEWEST_SLOTS
        self.layout, self.num_layers, self.num_experts = layout, num_layers, num_experts
        self.folder, self.num_slots = folder, num_slots
        self.host_bytes = num_slots * layout.payload_bytes
        self.disk_bytes = num_layers * num_experts * layout.payload_bytes
        self.faults: Counter[str] = Counter()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with ExitStack() as undo:
                self._lock = FolderLock(folder)
                undo.callback(self._lock.close)
                self._slab = Slab(
                    folder / FILE,
                    slot_bytes=layout.payload_bytes,
                    num_slots=num_layers * num_experts,
                    clear=True,
                )
                undo.pop_all()
        except OSError as error:
            raise TierError(
                f"folder {folder} for experts cannot be used: {error.strerror or error}; "
                "give a folder that can be written"
            ) from error
        self.rows = HostRows(num_slots, layout.weight_bytes)
        self._num_transit = max(FEWEST_SLOTS, min(_MOST_IN_TRANSIT, num_slots // 4))
        share, more = divmod(num_slots - self._num_transit, num_layers)
        self._shares = [min(num_experts, share + (i < more)) for i in range(num_layers)]
        self._sums = np.zeros((num_layers, num_experts), np.uint32)
        self._kept: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(num_layers)]
        self._free = deque(range(num_slots))
        self._busy: dict[int, Event] = {}  # by slot: until it may be written
        self._wanted: deque[tuple[int, int]] = deque()  # to be read, in this order
        self._planned: set[tuple[int, int]] = set()  # experts that a step is going to take
        self._current: set[tuple[int, int]] = set()  # of these, in the layer of now
        self._reading: dict[tuple[int, int], int] = {}  # key -> slot
        self._jobs: dict[int, tuple[int, int]] = {}  # transfer id -> key
        self._arrived: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._failed: dict[tuple[int, int], str] = {}
        self._next_id = 0
        self._host_hits = self._num_reads = 0
        self._wait_s = 0.0
        self._is_closed = False
        self._pid = os.getpid()
        self._mailbox = Mailbox()
        self._queue = IoQueue(
            "expert-read",
            num_threads=_NUM_THREADS,
            limit_s=read_deadline_s,
            expired_fault=_LATE,
            run=self._read,
            mailbox=self._mailbox,
        )
        self._read_deadline_s = read_deadline_s

    @property
    def is_closed(self) -> bool:
        """Whether the file is gone."""
        return self._is_closed

    def counts(self) -> StoreCounts:
        """What it did since the start, or since `reset_counts`."""
        read_bytes = self._num_reads * self.layout.payload_bytes
        return StoreCounts(self._host_hits, self._num_reads, read_bytes, self._wait_s)

    def reset_counts(self) -> None:
        """Count from zero, faults too."""
        self._host_hits = self._num_reads = 0
        self._wait_s = 0.0
        self.faults.clear()

    def write_layer(self, layer: int, up: torch.Tensor, down: torch.Tensor) -> None:
        """Store the experts of a layer, and keep in host memory those it has room for.

        Args:
            layer: which one; each is written once, before any step.
            up: `[E, *layout.up]`, on any device.
            down: `[E, *layout.down]`, likewise.

        Raises:
            TierError: the disk failed.
        """

        @torch.inference_mode()
        def write(expert: int, slot: int) -> None:
            up_at, down_at = self.layout.views(self.rows.payloads[slot : slot + 1])
            up_at[0].copy_(up[expert])
            down_at[0].copy_(down[expert])
            view = self.rows.arena.view(slot)
            self._sums[layer, expert] = checksum(_name(layer, expert), view)
            self._slab.write(layer * self.num_experts + expert, view)

        kept, share = self._kept[layer], self._shares[layer]
        at_once = min(_NUM_THREADS, self._num_transit)
        with ThreadPoolExecutor(at_once) as pool:
            for first in range(0, self.num_experts, at_once):
                experts = range(first, min(first + at_once, self.num_experts))
                slots = [self._free.popleft() for _ in experts]
                try:
                    list(pool.map(write, experts, slots))
                except OSError as error:
                    raise TierError(
                        f"experts cannot be written to {self.folder}: {error.strerror or error}; "
                        "give expert_disk_path a folder on a disk that works"
                    ) from error
                for expert, slot in zip(experts, slots, strict=True):
                    if len(kept) < share:
                        kept[expert] = slot
                    else:
                        self._free.append(slot)

    def expect(
        self, layer: int, experts: Sequence[int], ahead: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Say what is taken next: starts to read it, in this order, as far as slots are free.

        Args:
            layer: of now. What was expected before and was not taken is not read any more.
            experts: of the layer.
            ahead: (layer, expert) that are likely to be expected after these.
        """
        self._current = {(layer, expert) for expert in experts}
        plan = [key for key in [*((layer, e) for e in experts), *ahead] if not self._has(key)]
        self._planned = set(plan)
        self._failed.clear()
        for key in [key for key in self._arrived if key not in self._planned]:
            self._free.append(self._arrived.pop(key))
        self._settle()
        self._wanted = deque(
            key for key in plan if key not in self._reading and key not in self._arrived
        )
        self._start_reads()

    @contextmanager
    def take(
        self, layer: int, expert: int, *, until: Callable[[], Event | None] = lambda: None
    ) -> Iterator[torch.Tensor]:
        """The `[payload_bytes]` uint8 of one expert, in host memory; waits for the disk.

        Args:
            layer: of the expert.
            expert: which of the layer.
            until: called at the end of the block; the slot is not written before its event.

        Raises:
            ExpertReadError: it cannot be read, is damaged, or does not come in time.
        """
        key = (layer, expert)
        slot = self._kept[layer].get(expert)
        if slot is not None:
            self._host_hits += 1
        else:
            start_s = time.monotonic()
            try:
                slot = self._fetch(key)
            finally:
                self._wait_s += time.monotonic() - start_s
            self._planned.discard(key)
        try:
            yield self.rows.payloads[slot]
        finally:
            event = until()
            if event is not None:
                self._busy[slot] = event
            if expert not in self._kept[layer]:
                self._keep_or_free(key, slot)
            self._settle()
            self._start_reads()

    def check(self) -> None:
        """Assert that each slot is free, kept, being read or read: just one. Between takes."""
        kept = [slot for layer in self._kept for slot in layer.values()]
        slots = [*self._free, *kept, *self._reading.values(), *self._arrived.values()]
        assert sorted(slots) == list(range(self.num_slots)), slots
        assert all(
            len(layer) <= share for layer, share in zip(self._kept, self._shares, strict=True)
        )
        keys = [*self._reading, *self._arrived]
        assert len(keys) == len(set(keys)) and not any(self._has(key) for key in keys)
        assert set(self._jobs.values()) == set(self._reading)

    def close(self) -> None:
        """Remove the file, and let go of its folder. No step may follow."""
        if self._is_closed or os.getpid() != self._pid:  # a fork's exit leaves it to its parent
            return
        self._is_closed = True
        self.rows.unpin()
        ended = self._queue.close(_CLOSE_S)
        with suppress(OSError):  # gone already
            (self.folder / FILE).unlink()
        if ended:  # else a thread hangs in the file
            self._slab.close()
            self._lock.close()

    def _has(self, key: tuple[int, int]) -> bool:
        return key[1] in self._kept[key[0]]

    def _fetch(self, key: tuple[int, int]) -> int:
        """The slot that has it, once it has been read."""
        deadline_s = time.monotonic() + self._read_deadline_s
        self._planned.add(key)
        while True:
            self._settle()
            slot = self._arrived.pop(key, None)
            if slot is not None:
                return slot
            fault = self._failed.pop(key, None)
            left_s = deadline_s - time.monotonic()
            if fault is None and left_s <= 0:
                fault = _LATE
                self.faults[fault] += 1
            if fault is not None:
                raise ExpertReadError(
                    f"expert {key[1]} of layer {key[0]} cannot be read from "
                    f"{self.folder / FILE} ({fault}); check that disk"
                )
            if key not in self._reading:
                if key in self._wanted:
                    self._wanted.remove(key)
                self._wanted.appendleft(key)
                if not self._free and self._arrived:  # of what comes later
                    other, slot = self._arrived.popitem()
                    self._wanted.append(other)
                    self._free.append(slot)
                self._start_reads(is_urgent=True)
            self._mailbox.wait(left_s)

    def _keep_or_free(self, key: tuple[int, int], slot: int) -> None:
        kept, share = self._kept[key[0]], self._shares[key[0]]
        if len(kept) >= share:
            stale = next((e for e in kept if (key[0], e) not in self._current), None)
            if stale is None:
                self._free.append(slot)
                return
            self._free.append(kept.pop(stale))
        kept[key[1]] = slot

    def _free_slot(self, *, is_urgent: bool) -> int | None:
        """A slot that can be written now; None where there is none."""
        for _ in range(len(self._free)):
            slot = self._free.popleft()
            event = self._busy.get(slot)
            if event is None or event.query():
                self._busy.pop(slot, None)
                return slot
            self._free.append(slot)
        if not is_urgent or not self._free:
            return None
        slot = self._free.popleft()
        self._busy.pop(slot).synchronize()
        return slot

    def _start_reads(self, *, is_urgent: bool = False) -> None:
        while self._wanted:
            slot = self._free_slot(is_urgent=is_urgent)
            if slot is None:
                return
            is_urgent = False
            key = self._wanted.popleft()
            self._next_id += 1
            place = key[0] * self.num_experts + key[1]
            view = self.rows.arena.view(slot)
            job = Job(self._next_id, _name(*key), place, view, time.monotonic())
            job.checksum = int(self._sums[key])
            self._reading[key] = slot
            self._jobs[job.transfer_id] = key
            self._queue.submit(job)

    def _settle(self) -> None:
        """Take note of the reads that have ended."""
        self._queue.expire()
        for job in self._mailbox.take():
            key = self._jobs.pop(job.transfer_id)
            slot = self._reading.pop(key)
            self.faults.update(job.faults)
            self._num_reads += 1
            if job.ok and key in self._planned:
                self._arrived[key] = slot
                continue
            self._free.append(slot)
            if not job.ok:
                self._failed[key] = job.faults[-1]

    def _read(self, job: Job) -> bool:
        """In a worker."""
        try:
            self._slab.read(job.slot, job.buffer)
        except EOFError:
            job.faults.append("expert_disk_truncated")
            return False
        except OSError:
            job.faults.append("expert_disk_io_error")
            return False
        if checksum(job.key, job.buffer) != job.checksum:
            job.faults.append("expert_disk_corrupt")
            return False
        return True


def _name(layer: int, expert: int) -> bytes:
    """What a checksum covers beside the payload: another expert's bytes do not pass."""
    return f"{layer}.{expert}".encode()
