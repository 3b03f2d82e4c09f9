"""Experts below host memory: all in one file, and in host slots those that it has room for."""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hotset.cost.expert_sizes import FEWEST_HOST_SLOTS
from hotset.errors import ExpertReadError, TierError
from hotset.eviction import Order, policy_named
from hotset.experts.host import ExpertLayout, HostRows
from hotset.experts.narrow import NarrowLayout
from hotset.memory.disk.fixed import FixedSlab
from hotset.memory.residency import Payload, Residency, State
from hotset.memory.tier import CompletionStatus

FILE = "experts.slab"

_NUM_THREADS = 4
_MOST_IN_TRANSIT = 16
_CLOSE_S = 5.0
_LATE = "expert_disk_late"


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

    Each layer keeps an equal share of the host slots; a few are in transit between the disk and the
    computing layer. A step says layer by layer what it needs (`expect`), which starts reads in that
    order as far as slots are free, and then takes one after the other. An expert that was read
    stays if its layer has room, or in the place of another of the layer that the policy evicts and
    that this step does not take; else its slot is free for the next read.

    Bookkeeping is done in the caller's thread; workers only read, write and sum.

    Args:
        folder: created where missing. One process at a time.
        layout: of each expert as it is computed with.
        narrow: as it is stored, in fewer bits; None where that is the same.
        num_layers: L.
        num_experts: E, of each layer.
        num_slots: of host memory; `FEWEST_HOST_SLOTS` or more.
        read_deadline_s: the longest a step waits for one expert.
        eviction: of host slots, a name in `eviction`.

    Attributes:
        payload_bytes: of an expert as it is stored.
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
        narrow: NarrowLayout | None = None,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        read_deadline_s: float,
        eviction: str = "least-stale",
    ) -> None:
        assert num_slots >= FEWEST_HOST_SLOTS
        self.layout, self.narrow = layout, narrow
        self.num_layers, self.num_experts = num_layers, num_experts
        stored = narrow or layout
        self.payload_bytes = stored.payload_bytes
        self.folder, self.num_slots = folder, num_slots
        self.host_bytes = num_slots * self.payload_bytes
        self.disk_bytes = num_layers * num_experts * self.payload_bytes
        self.faults: Counter[str] = Counter()
        self._keys = [[_name(i, e) for e in range(num_experts)] for i in range(num_layers)]
        self._experts = {key: (i, e) for i, ks in enumerate(self._keys) for e, key in enumerate(ks)}
        self._disk = FixedSlab(
            folder,
            file=FILE,
            what=f"folder {folder} for experts",
            places={key: place for place, key in enumerate(self._experts)},
            payload_bytes=self.payload_bytes,
            num_threads=_NUM_THREADS,
            read_deadline_s=read_deadline_s,
            fault_prefix="expert_disk",
        )
        self.rows = HostRows(num_slots, stored.weight_bytes)
        self._num_transit = max(FEWEST_HOST_SLOTS, min(_MOST_IN_TRANSIT, num_slots // 4))
        share, more = divmod(num_slots - self._num_transit, num_layers)
        self._shares = [min(num_experts, share + (i < more)) for i in range(num_layers)]
        # Of each layer, the experts that it keeps: READY and without a pin.
        self._kept: list[Order[bytes]] = [policy_named(eviction).order() for _ in range(num_layers)]
        self._host = Residency(num_slots, self._kept_beside)
        self._copies: dict[int, torch.cuda.Event] = {}  # by slot: until it may be written
        self._leaving: deque[tuple[int, torch.cuda.Event]] = deque()  # detached slots
        self._wanted: deque[bytes] = deque()  # to be read, in this order
        self._planned: dict[bytes, None] = {}  # what a step is going to take; READY: pinned
        self._current: set[bytes] = set()  # of these, in the layer of now
        self._reads: dict[int, Payload] = {}  # by transfer id
        self._failed: dict[bytes, str] = {}
        self._host_hits = self._num_reads = 0
        self._wait_s = 0.0
        self._is_closed = False
        self._pid = os.getpid()
        self._read_deadline_s = read_deadline_s

    @property
    def is_closed(self) -> bool:
        """Whether the file is gone."""
        return self._is_closed

    def counts(self) -> StoreCounts:
        """What it did since the start, or since `reset_counts`."""
        read_bytes = self._num_reads * self.payload_bytes
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

        def fill(expert: int, payload: torch.Tensor) -> None:
            up_at, down_at = self.layout.views(payload.unsqueeze(0))
            up_at[0].copy_(up[expert])
            down_at[0].copy_(down[expert])

        self.write_payloads(layer, fill)

    def write_payloads(self, layer: int, fill: Callable[[int, torch.Tensor], None]) -> None:
        """As `write_layer`, of experts that `fill` puts there.

        Args:
            layer: which one.
            fill: writes the `[payload_bytes]` uint8 of an expert, in any thread.
        """

        @torch.inference_mode()
        def write(expert: int, payload: Payload) -> None:
            fill(expert, self.rows.payloads[payload.slot])
            self._disk.write(payload.key, self.rows.arena.view(payload.slot))

        at_once = min(_NUM_THREADS, self._num_transit)
        with ThreadPoolExecutor(at_once) as pool:
            for first in range(0, self.num_experts, at_once):
                experts = range(first, min(first + at_once, self.num_experts))
                keys = self._keys[layer][experts.start : experts.stop]
                payloads = [self._host.reserve(key, State.SPILLING) for key in keys]
                try:
                    list(pool.map(write, experts, payloads))
                except OSError as error:
                    raise TierError(
                        f"experts cannot be written to {self.folder}: {error.strerror or error}; "
                        "give expert_disk_path a folder on a disk that works"
                    ) from error
                for payload in payloads:
                    if len(self._kept[layer]) < self._shares[layer]:
                        self._host.become_ready(payload)
                    else:
                        self._host.abandon(payload)

    def expect(
        self, layer: int, experts: Sequence[int], ahead: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Say what is taken next: starts to read it, in this order, as far as slots are free.

        Args:
            layer: of now. What was expected before and was not taken is not read any more.
            experts: of the layer.
            ahead: (layer, expert) that are likely to be expected after these.
        """
        keys = [self._keys[layer][expert] for expert in experts]
        self._current = set(keys)
        keys += [self._keys[later][expert] for later, expert in ahead]
        before, self._planned = self._planned, {k: None for k in keys if not self._host.is_idle(k)}
        self._failed.clear()
        for key in before:
            payload = self._host.get(key)
            if key not in self._planned and payload is not None and payload.is_ready:
                self._let_go(payload)
        self._settle()
        self._wanted = deque(key for key in self._planned if self._host.get(key) is None)
        self._start_reads()

    @contextmanager
    def take(
        self,
        layer: int,
        expert: int,
        *,
        until: Callable[[], torch.cuda.Event | None] = lambda: None,
    ) -> Iterator[torch.Tensor]:
        """The `[payload_bytes]` uint8 of one expert, in host memory; waits for the disk.

        Args:
            layer: of the expert.
            expert: which of the layer.
            until: called at the end of the block; the slot is not written before its event.

        Raises:
            ExpertReadError: it cannot be read, is damaged, or does not come in time.
        """
        key = self._keys[layer][expert]
        payload = self._host.get(key)
        is_kept = payload is not None and self._host.is_idle(key)
        if payload is not None and is_kept:
            self._host_hits += 1
            self._host.touch(key)
        else:
            start_s = time.monotonic()
            try:
                payload = self._fetch(key)
            finally:
                self._wait_s += time.monotonic() - start_s
            del self._planned[key]
        try:
            yield self.rows.payloads[payload.slot]
        finally:
            event = until()
            if event is not None:
                self._copies[payload.slot] = event
            if not is_kept:
                self._keep_or_let_go(payload)
            self._settle()
            self._start_reads()

    def check(self) -> None:
        """Assert that host slots are consistent, and no layer keeps too much. Between takes."""
        self._host.check()
        assert all(len(kept) <= share for kept, share in zip(self._kept, self._shares, strict=True))
        assert {payload.key for payload in self._reads.values()} == self._host.filling()

    def close(self) -> None:
        """Remove the file, and let go of its folder. No step may follow."""
        if self._is_closed or os.getpid() != self._pid:  # a fork's exit leaves it to its parent
            return
        self._is_closed = True
        self.rows.unpin()
        self._disk.close(_CLOSE_S)

    def _kept_beside(self, key: bytes) -> Order[bytes]:
        return self._kept[self._experts[key][0]]

    def _fetch(self, key: bytes) -> Payload:
        """The record of an expert that is not kept, once it has been read."""
        deadline_s = time.monotonic() + self._read_deadline_s
        self._planned[key] = None
        while True:
            self._settle()
            payload = self._host.get(key)
            if payload is not None and payload.is_ready:
                return payload
            fault = self._failed.pop(key, None)
            left_s = deadline_s - time.monotonic()
            if fault is None and left_s <= 0:
                fault = _LATE
                self.faults[fault] += 1
            if fault is not None:
                layer, expert = self._experts[key]
                raise ExpertReadError(
                    f"expert {expert} of layer {layer} cannot be read from {self._disk.path} "
                    f"({fault}); check that disk"
                )
            if payload is None:
                self._hurry(key)
            self._disk.wait(left_s)

    def _hurry(self, key: bytes) -> None:
        """Read an expert next, into the slot of one that is needed later if there is no other."""
        if key in self._wanted:
            self._wanted.remove(key)
        self._wanted.appendleft(key)
        if not self._host.num_free and not self._leaving:
            arrived = (k for k in reversed(self._planned) if self._host.is_ready(k))
            later = self._host.get(next(arrived, b""))
            if later is not None:
                self._wanted.append(later.key)
                self._let_go(later)
        self._start_reads(is_urgent=True)

    def _keep_or_let_go(self, payload: Payload) -> None:
        layer = self._experts[payload.key][0]
        if len(self._kept[layer]) >= self._shares[layer]:
            victim = self._host.victim(payload.key, lambda key: key in self._current)
            self._let_go(victim or payload)
            if victim is None:
                return
        self._host.unpin(payload)

    def _let_go(self, payload: Payload) -> None:
        """Forget a payload, and free its slot as soon as no copy reads it."""
        copy = self._copies.pop(payload.slot, None)
        if copy is None or copy.query():
            self._host.forget(payload)
        else:
            self._leaving.append((self._host.detach(payload), copy))

    def _has_free_slot(self, *, is_urgent: bool) -> bool:
        """Whether a slot can be written now; waits for one if that is urgent."""
        for _ in range(len(self._leaving)):
            slot, copy = self._leaving.popleft()
            if copy.query():
                self._host.give_back(slot)
            else:
                self._leaving.append((slot, copy))
        if not self._host.num_free and is_urgent and self._leaving:
            slot, copy = self._leaving.popleft()
            copy.synchronize()
            self._host.give_back(slot)
        return self._host.num_free > 0

    def _start_reads(self, *, is_urgent: bool = False) -> None:
        while self._wanted and self._has_free_slot(is_urgent=is_urgent):
            is_urgent = False
            payload = self._host.reserve(self._wanted.popleft(), State.READING)
            view = self.rows.arena.view(payload.slot)
            self._reads[self._disk.submit_read(payload.key, view)] = payload

    def _settle(self) -> None:
        """Take note of the reads that have ended."""
        for completion in self._disk.poll():
            payload = self._reads.pop(completion.transfer_id)
            self._num_reads += 1
            if completion.fault is not None:
                self.faults[completion.fault] += 1
                self._failed[payload.key] = completion.fault
            if completion.status is CompletionStatus.OK and payload.key in self._planned:
                self._host.pin(payload)
                self._host.become_ready(payload)
            else:
                self._host.abandon(payload)


def _name(layer: int, expert: int) -> bytes:
    """What a checksum covers beside the payload: another expert's bytes do not pass."""
    return f"{layer}.{expert}".encode()
