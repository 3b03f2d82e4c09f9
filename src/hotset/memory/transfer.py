"""Moving blocks between the device, host memory and the tier below it."""

import queue
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hotset.cost.rates import Rates
from hotset.errors import OutOfBlocksError
from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.colder_tiers import EndedTransfer
from hotset.memory.cuda_copier import CudaCopier
from hotset.memory.host_tier import HostTier
from hotset.memory.tier import CompletionStatus, Tier
from hotset.metrics import Metrics

_DISK_RATE_WINDOW_S = 0.25
_PROBE_S = 2.0
_ASSUMED_DISK_RATE = 100_000_000  # bytes/s of a tier below of which nothing could be read


class Copier(Protocol):
    """Copies blocks between the device pool and host slots, beside the model's steps.

    Attributes:
        num_ready_slots: how many leading host slots can be used; may grow.
    """

    num_ready_slots: int

    def mark(self) -> None:
        """Note the compute submitted so far, for `submit`."""
        ...

    def submit(self, pairs: Sequence[tuple[int, int]], *, to_host: bool) -> int:
        """Start copying all (block, host slot) pairs one way; returns an id.

        The copies wait for the compute that was submitted before the last `mark`.
        """
        ...

    def order(self, copy_id: int) -> bool:
        """Have compute submitted from here on wait for a copy on the device; False if none can."""
        ...

    def poll(self) -> list[tuple[int, float]]:
        """Ids that ended since the last call, with the seconds each took."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until something can be polled, or `timeout_s` has passed."""
        ...

    def close(self) -> None:
        """Finish what was submitted and release the resources."""
        ...


class ThreadCopier:
    """Copies with one thread, for a device pool in CPU memory. numpy copies without the GIL."""

    def __init__(self, device: np.ndarray, host: np.ndarray) -> None:
        self._device = device
        self._host = host[:, : device.shape[1]]
        self.num_ready_slots = len(host)
        self._jobs: queue.SimpleQueue[tuple[int, list[tuple[int, int]], bool] | None]
        self._jobs = queue.SimpleQueue()
        self._ended: deque[tuple[int, float]] = deque()
        self._something_ended = threading.Event()
        self._next_id = 0
        self._thread = threading.Thread(target=self._run, name="hotset-copy", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Compute that was submitted has ended: nothing to note."""

    def submit(self, pairs: Sequence[tuple[int, int]], *, to_host: bool) -> int:
        """Queue a batch; batches run in order."""
        self._next_id += 1
        self._jobs.put((self._next_id, list(pairs), to_host))
        return self._next_id

    def order(self, copy_id: int) -> bool:
        """Nothing but the host waits for this thread."""
        return False

    def poll(self) -> list[tuple[int, float]]:
        """Ids that ended since the last call, with the seconds each took."""
        self._something_ended.clear()
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def wait(self, timeout_s: float) -> None:
        """Block until something can be polled, or `timeout_s` has passed."""
        self._something_ended.wait(timeout_s)

    def close(self) -> None:
        """Finish the queued batches and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            copy_id, pairs, to_host = job
            start_s = time.perf_counter()
            for block, slot in pairs:
                if to_host:
                    self._host[slot] = self._device[block]
                else:
                    self._device[block] = self._host[slot]
            self._ended.append((copy_id, time.perf_counter() - start_s))
            self._something_ended.set()


def make_copier(device: DeviceArena, host: HostArena) -> Copier:
    """The copier for where the pool is."""
    if device.storage.device.type == "cuda":
        return CudaCopier(device, host)
    return ThreadCopier(device.bytes_view(), host.slots)


@dataclass(slots=True)
class _Copy:
    """A submitted batch: (key, block) pairs, all in one direction.

    Attributes:
        is_brief: whether it is to end before the step that it was submitted beside.
        has_arrived: whether its fetches were reported.
    """

    entries: list[tuple[bytes, int]]
    to_host: bool
    is_brief: bool
    has_arrived: bool = False


class TierStack:
    """Host memory and, below it, at most one more tier; implements `colder_tiers.ColderTiers`.

    Payloads pass through host slots both ways: device -> host -> disk as each step ends, and
    disk -> host -> device on a fetch. So a slow or hanging disk holds host slots only, never a
    device copy. A payload that went up to the device, and that the disk has too, is the next to
    leave host memory: payloads staged for waiting requests are needed sooner
    (exclusive caching: Wong and Wilkes, "My Cache or Yours?", USENIX ATC 2002). All methods are
    called from the engine thread; `flush`, once per step, submits the copies asked for since the
    last one as one batch per direction.
    """

    def __init__(
        self,
        host: HostTier,
        arena: HostArena,
        copier: Copier,
        *,
        block_bytes: int,
        rates: Rates,
        metrics: Metrics,
        below: Tier | None = None,
    ) -> None:
        self.host = host
        self.below = below
        self._arena = arena
        self._copier = copier
        self._block_bytes = block_bytes
        self._rates = rates
        self._metrics = metrics
        self._private: dict[bytes, bool] = {}  # key -> dropped while it was in use
        self._keep_when_filled: Counter[bytes] = Counter()  # filling key -> pins to come
        self._to_copy_down: list[tuple[bytes, int]] = []
        self._to_copy_up: list[tuple[bytes, int]] = []
        self._copies: dict[int, _Copy] = {}
        self._waiting: dict[bytes, list[int]] = {}  # filling key -> blocks that want it
        self._reads: dict[int, bytes] = {}  # transfer id of `below` -> key
        self._reading: set[bytes] = set()
        self._late: set[bytes] = set()  # being read past the deadline: as good as not there
        self._writes: dict[int, bytes] = {}
        self._ended: list[EndedTransfer] = []
        self._num_fetching = 0
        self._read_window_start_s = 0.0
        self._read_window_bytes = 0
        self._grow()

    def measure_rates(self, *, num_blocks: int) -> None:
        """Copy `num_blocks` blocks each way, read as many payloads from below, note the rates.

        Before any use. The content of the device blocks stays as it was, and so does what is
        stored below: payloads are written there only into free room, and forgotten afterwards.
        Takes a few seconds at most, however slow the tier below is.
        """
        self._copier.mark()
        for to_host in (True, False):
            self._copier.submit([(block, block) for block in range(num_blocks)], to_host=to_host)
            while not (ended := self._copier.poll()):
                self._copier.wait(1.0)
            if not to_host:
                self._rates.observe_link("host", num_blocks * self._block_bytes, ended[0][1])
        if self.below is not None:
            moved_bytes = self._metrics.moved_bytes.copy()
            self._measure_below(self.below, num_blocks)
            self._metrics.moved_bytes = moved_bytes  # of requests only

    def _measure_below(self, below: Tier, num_payloads: int) -> None:
        """Read payloads that are stored; where there are too few, write some for that."""
        start_s = time.perf_counter()
        usage = below.usage()
        keys = below.newest_keys(num_payloads)
        num_probes = min(num_payloads - len(keys), usage.capacity_payloads - usage.used_payloads)
        probes = [secrets.token_bytes(16) for _ in range(num_probes)]
        for key in probes:
            self.host.reserve(key)
            self.host.commit(key)
            self._write_below(key)
        self._wait_below(below, self._writes)
        for key in probes:
            self.host.discard(key)
        for key in [*keys, *probes]:
            self.stage(key)
        self._wait_below(below, self._reads)
        for key in [*keys, *probes]:
            self.host.discard(key)
        below.discard(probes)
        if below.name not in self._rates.link_bytes_per_s:  # not one payload was read
            seconds = time.perf_counter() - start_s
            observed = (self._block_bytes, seconds) if self._reads else (_ASSUMED_DISK_RATE, 1.0)
            self._rates.observe_link(below.name, *observed)

    def _wait_below(self, below: Tier, transfers: dict[int, bytes]) -> None:
        """Wait until `transfers` have ended, or one is late, or there was time enough.

        What goes on keeps its host slot and ends as any other transfer does.
        """
        deadline_s = time.perf_counter() + _PROBE_S
        while transfers and not self._late and (left_s := deadline_s - time.perf_counter()) > 0:
            below.wait(left_s)
            self._poll_below(below)

    def locate(self, key: bytes) -> str | None:
        """Name of the fastest tier that has the payload of `key`, or will shortly."""
        if self.host.is_ready(key):
            return "host"
        if key in self._late:
            return None
        if self.host.is_filling(key):
            return self.below.name if self.below and key in self._reading else "host"
        if self.below is not None and self.below.contains(key):
            return self.below.name
        return None

    def spill(self, key: bytes, block: int, *, private: bool = False) -> bool:
        """Copy `block` down with the next `flush`; False where host memory has no room."""
        if key in self._late:
            return False
        try:
            self.host.reserve(key)
        except OutOfBlocksError:
            self._metrics.faults["host_full"] += 1
            return False
        if private:
            self._private[key] = False
        self._to_copy_down.append((key, block))
        return True

    def fetch(self, key: bytes, block: int) -> None:
        """Copy the payload of `key` into `block`, from wherever it is; `poll` tells the end."""
        self._num_fetching += 1
        if self.host.is_ready(key):
            self.host.pin(key)
            self._to_copy_up.append((key, block))
        elif self.stage(key):
            self._waiting.setdefault(key, []).append(block)
        else:
            self._end_fetch(key, block, ok=False)

    def stage(self, key: bytes) -> bool:
        """Start bringing `key` from the tier below into host memory, ahead of a fetch.

        Returns whether it is on its way there, or there already.
        """
        if self.host.is_filling(key) or self.host.is_ready(key):
            return key not in self._late
        if self.below is None or not self.below.contains(key):
            return False
        try:
            slot = self.host.reserve(key)
        except OutOfBlocksError:
            return False
        if not self._reads:
            self._read_window_start_s = time.perf_counter()
            self._read_window_bytes = 0
        self._reads[self.below.submit_read(key, self._arena.view(slot))] = key
        self._reading.add(key)
        return True

    def most_staged(self) -> int:
        """Half of host memory: the other half is for what comes down meanwhile."""
        return self.host.num_slots // 2

    def keep(self, key: bytes) -> bool:
        """Hold the payload of `key` in host memory until `unkeep`.

        False where it is not there, or would leave too few slots for what passes through.
        """
        if self.num_evictable() <= 0:
            return False
        if self.host.is_ready(key):
            self.host.pin(key)
        elif self.host.is_filling(key) and key not in self._reading:
            self._keep_when_filled[key] += 1
        else:
            return False
        return True

    def unkeep(self, key: bytes) -> None:
        """Undo one `keep`."""
        if key in self._keep_when_filled:
            self._keep_when_filled[key] -= 1
            self._keep_when_filled += Counter()  # drops zeros
        else:
            self.host.unpin(key)
            self._discard_if_dropped(key)

    def num_evictable(self) -> int:
        """Payloads that host memory can take beside what is kept and what is being moved.

        Some slots stay for what comes from the tier below.
        """
        num_passing = 0 if self.below is None else 1 + self.host.num_slots // 8
        return self.host.num_evictable - num_passing

    def drop(self, key: bytes) -> None:
        """Forget a private payload, at once or as soon as no copy uses it."""
        if key in self._private:
            self._private[key] = True
            self._discard_if_dropped(key)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark payloads as just used, in the lowest tier."""
        if self.below is not None:
            self.below.touch(list(keys))
            return
        for key in keys:
            self.host.touch(key)

    def queued_fetch_bytes(self) -> int:
        """Bytes asked for by `fetch` that have not arrived."""
        return self._num_fetching * self._block_bytes

    @property
    def is_busy(self) -> bool:
        """Whether copies, reads or writes are under way."""
        return bool(
            self._to_copy_down
            or self._to_copy_up
            or self._copies
            or self._reads
            or self._writes
            or self._ended
        )

    def mark(self) -> None:
        """Note the compute submitted so far, for `flush`."""
        self._copier.mark()

    def flush(self, *, after_mark: bool = False, most_s: float | None = None) -> None:
        """Submit the copies asked for since the last call.

        Args:
            after_mark: whether they may overtake compute that was submitted since `mark`.
            most_s: submit no more fetches than the link moves in this time, one at least; the
                others go with the next calls. None is all.
        """
        if not after_mark:
            self._copier.mark()
        self._submit(self._to_copy_down, len(self._to_copy_down), to_host=True)
        num_up = len(self._to_copy_up)
        if most_s is not None:
            link_bytes = self._rates.link_bytes_per_s["host"] * most_s
            num_up = min(num_up, 1 + int(link_bytes / self._block_bytes))
        self._submit(self._to_copy_up, num_up, to_host=False, is_brief=most_s is not None)

    def _submit(
        self,
        entries: list[tuple[bytes, int]],
        count: int,
        *,
        to_host: bool,
        is_brief: bool = False,
    ) -> None:
        """Submit the first `count` of the copies that were asked for."""
        if not count:
            return
        submitted = entries[:count]
        del entries[:count]
        pairs = [(block, self.host.slot_of(key)) for key, block in submitted]
        copy_id = self._copier.submit(pairs, to_host=to_host)
        self._copies[copy_id] = _Copy(submitted, to_host, is_brief)

    def poll(self) -> list[EndedTransfer]:
        """What ended since the last call: spills, and fetches with their outcome.

        Fetches that a `flush` has bounded by a time have ended, too, if what is computed from here
        on can wait for them on the device.
        """
        self._grow()
        if self.below is not None:
            self._poll_below(self.below)
        for copy_id, seconds in self._copier.poll():
            self._end_copy(self._copies.pop(copy_id), seconds)
        for copy_id, copy in self._copies.items():
            if copy.is_brief and not copy.has_arrived and self._copier.order(copy_id):
                self._arrive(copy)
        ended, self._ended = self._ended, []
        return ended

    def _grow(self) -> None:
        if self._copier.num_ready_slots > self.host.num_slots:
            self.host.grow(self._copier.num_ready_slots)

    def wait(self, timeout_s: float) -> None:
        """Block until something may have ended, or `timeout_s` has passed."""
        if self._copies or self.below is None:
            self._copier.wait(timeout_s)
        else:
            self.below.wait(timeout_s)

    def close(self) -> None:
        """End the copies, then the tier below."""
        self._copier.close()
        if self.below is not None:
            self.below.close()

    def _end_copy(self, copy: _Copy, seconds: float) -> None:
        num_bytes = len(copy.entries) * self._block_bytes
        if copy.to_host:
            self._metrics.moved_bytes["device>host"] += num_bytes
            for key, block in copy.entries:
                self._ended.append(EndedTransfer(key, block, is_fetch=False, ok=True))
                self._become_ready(key)
                self._write_below(key)
                self._discard_if_dropped(key)
        else:
            self._metrics.moved_bytes["host>device"] += num_bytes
            self._rates.observe_link("host", num_bytes, seconds)
            for key, _ in copy.entries:
                self.host.unpin(key)
                if self.below is not None and self.below.contains(key):
                    self.host.demote(key)
                self._discard_if_dropped(key)
            if not copy.has_arrived:
                self._arrive(copy)

    def _arrive(self, copy: _Copy) -> None:
        copy.has_arrived = True
        for key, block in copy.entries:
            self._end_fetch(key, block, ok=True)

    def _become_ready(self, key: bytes) -> None:
        """A host slot is filled: start the fetches that waited for it."""
        self.host.commit(key)
        for _ in range(self._keep_when_filled.pop(key, 0)):
            self.host.pin(key)
        for block in self._waiting.pop(key, ()):
            self.host.pin(key)
            self._to_copy_up.append((key, block))

    def _write_below(self, key: bytes) -> None:
        if self.below is None or key in self._private or self.below.contains(key):
            return
        slot = self.host.pin(key)
        transfer_id = self.below.submit_write(key, self._arena.view(slot))
        if transfer_id is None:
            self.host.unpin(key)
        else:
            self._writes[transfer_id] = key

    def _poll_below(self, below: Tier) -> None:
        for completion in below.poll():
            transfer_id, key = completion.transfer_id, completion.key
            if completion.status is CompletionStatus.LATE:
                # The slot stays with the tier until the read really ends; no fetch waits for it.
                self._late.add(key)
                self._fail_waiting(key)
            elif transfer_id in self._writes:
                self.host.unpin(self._writes.pop(transfer_id))
                if completion.status is CompletionStatus.OK:
                    self._metrics.moved_bytes[f"host>{below.name}"] += self._block_bytes
            else:
                del self._reads[transfer_id]
                self._reading.discard(key)
                self._late.discard(key)
                if completion.status is CompletionStatus.OK:
                    self._metrics.moved_bytes[f"{below.name}>host"] += self._block_bytes
                    self._observe_read(below.name)
                    self._become_ready(key)
                else:
                    self.host.abandon(key)
                    self._fail_waiting(key)
        for kind, count in below.usage().faults.items():
            self._metrics.faults[kind] = count

    def _observe_read(self, name: str) -> None:
        self._read_window_bytes += self._block_bytes
        seconds = time.perf_counter() - self._read_window_start_s
        if not self._reads or seconds > _DISK_RATE_WINDOW_S:
            self._rates.observe_link(name, self._read_window_bytes, seconds)
            self._read_window_start_s = time.perf_counter()
            self._read_window_bytes = 0

    def _fail_waiting(self, key: bytes) -> None:
        for block in self._waiting.pop(key, ()):
            self._end_fetch(key, block, ok=False)

    def _end_fetch(self, key: bytes, block: int, *, ok: bool) -> None:
        self._num_fetching -= 1
        self._ended.append(EndedTransfer(key, block, is_fetch=True, ok=ok))

    def _discard_if_dropped(self, key: bytes) -> None:
        if self._private.get(key, False) and not self.host.is_in_use(key):
            self.host.discard(key)
            del self._private[key]

    def check(self) -> None:
        """Assert that the host tier is consistent and that every filling slot is being filled."""
        self.host.check()
        filling = {key for key, _ in self._to_copy_down} | set(self._reads.values())
        for copy in self._copies.values():
            if copy.to_host:
                filling |= {key for key, _ in copy.entries}
        assert filling == self.host.filling_keys(), "a host slot waits for nothing"
        assert self._waiting.keys() <= filling, "a fetch waits for nothing"
        assert self._keep_when_filled.keys() <= filling, "a payload to keep is not on its way"
