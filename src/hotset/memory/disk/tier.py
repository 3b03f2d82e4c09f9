"""The disk tier: fixed-size payloads in one slab file, found again after a restart or a crash."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hotset.clock import REAL_CLOCK, Clock
from hotset.errors import TierError
from hotset.eviction import Order, policy_named
from hotset.memory.disk import index as disk_index
from hotset.memory.disk.block_files import BlockFiles, Peers
from hotset.memory.disk.io_queue import IoQueue, Job
from hotset.memory.disk.slab import SLOT_ALIGN_BYTES, slot_bytes_for
from hotset.memory.journal import OnChange
from hotset.memory.mailbox import Mailbox
from hotset.memory.tier import Answer, Completion, CompletionStatus, TierInfo, TierUsage

_FIXED_BYTES = disk_index.BASE_BYTES + SLOT_ALIGN_BYTES  # the lock file takes a page
_FAILURES_TO_PAUSE = 3
_PAUSE_S = 10.0
_CLOSE_S = 5.0

WRITE_DROPPED = "disk_write_dropped"
READ_LATE = "disk_read_late"


def capacity_bytes_for(num_payloads: int, payload_bytes: int) -> int:
    """Bytes on disk of a store for `num_payloads`, index and lock file included."""
    per_payload_bytes = slot_bytes_for(payload_bytes) + disk_index.ROW_BYTES
    return _FIXED_BYTES + num_payloads * per_payload_bytes


def payloads_within(capacity_bytes: int, payload_bytes: int) -> int:
    """How many payloads a store of `capacity_bytes` holds; 0 where it is too small."""
    per_payload_bytes = slot_bytes_for(payload_bytes) + disk_index.ROW_BYTES
    return max(0, (capacity_bytes - _FIXED_BYTES) // per_payload_bytes)


@dataclass(eq=False, slots=True)
class _Block:
    """A block that is being written, or can be read.

    Attributes:
        slot: its own while it is written, stored, or read.
        checksum: None while it is being written.
        is_wanted: whether it is to stay once it is written.
        num_readers: reads under way.
    """

    slot: int
    checksum: int | None = None
    is_wanted: bool = True
    num_readers: int = 0


class DiskTier:
    """A `Tier` in a folder, of bounded size.

    All bookkeeping (which key has which slot, which goes first, what is pinned) is done in the
    caller's thread, in `submit_*`, `touch` and `poll`; workers only transfer and write the index.
    So nothing changes behind the caller's back: a block is there once `poll` reported its write.

    A slot is given to a write when it is submitted, evicting then; reads pin theirs. Writing a key
    that is there, or on its way, stores nothing and counts as a use: None, and no fault.

    A write is refused when the queue would take more than `write_queue_s` at the measured pace
    (mean of recent writes), and dropped when it waited that long after all. After 3 failures in
    a row writes are refused for 10 seconds, then tried again.

    Faults counted in `usage()`, by kind: `disk_write_dropped`, `disk_read_late`, `disk_missing`
    (a read of a key that is not there), `disk_corrupt`, `disk_truncated`, `disk_full`,
    `disk_read_only`, `disk_io_error`, `disk_index_failed`, `disk_index_damaged` (at open).

    A restart keeps the blocks and their order of writing, not of reading.

    Args:
        folder: created where missing, readable by the user only. One process at a time.
        payload_bytes: of one block.
        capacity_bytes: bound of all files together; the slab is allocated at once.
        fingerprint: what blocks depend on (model, weights, dtype, block size, layout). Blocks of
            another one, or of another `payload_bytes`, are thrown away.
        read_deadline_s: a read is reported LATE, or dropped if not begun, after this.
        write_queue_s: the longest a write waits for its turn.
        num_threads: for reads, and as many again for writes.
        eviction: the name of a policy in `eviction`.
        clock: of deadlines, pauses and the pace of writes.
        peers: have other parts of each block; None where all is here.

    Attributes:
        slot_bytes: length of every buffer given to `submit_*`: `payload_bytes` in whole pages.
        capacity_payloads: how many fit.
        reclaimed: why blocks found at open were thrown away, or None.
        on_change: see `journal.Source`.

    Raises:
        TierError: too small, no space, in use, or not writable. Blocks that were there still are,
            unless they are of another fingerprint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        payload_bytes: int,
        capacity_bytes: int,
        fingerprint: Mapping[str, str],
        read_deadline_s: float,
        write_queue_s: float,
        num_threads: int = 2,
        eviction: str = "lru",
        clock: Clock = REAL_CLOCK,
        peers: Peers | None = None,
    ) -> None:
        self.payload_bytes, self.slot_bytes = payload_bytes, slot_bytes_for(payload_bytes)
        self.capacity_payloads = num_slots = payloads_within(capacity_bytes, payload_bytes)
        if num_slots < 1:
            raise TierError(
                f"disk tier of {capacity_bytes} bytes holds no block of {payload_bytes}; "
                f"give at least {capacity_bytes_for(1, payload_bytes)}"
            )
        self.info = TierInfo("disk", num_slots, self.slot_bytes)
        self.on_change: OnChange | None = None
        self._clock = clock
        self._files = files = BlockFiles(
            folder,
            num_slots,
            payload_bytes=payload_bytes,
            fingerprint=fingerprint,
            clock=clock,
            peers=peers,
        )
        self.reclaimed, self._faults = files.reclaimed, files.faults
        # Rows come in order of writing; of two for a key the later counts.
        rows = {row.key: row for row in files.rows.values()}
        self._blocks = {key: _Block(row.slot, row.checksum) for key, row in rows.items()}
        self._order: Order[bytes] = policy_named(eviction).order()  # of those that can be read
        for key in self._blocks:
            self._order.admit(key)
        taken = {block.slot for block in self._blocks.values()}
        self._free = deque(slot for slot in range(num_slots) if slot not in taken)
        self._moving: dict[int, _Block] = {}  # by transfer id
        self._on_time: dict[int, Job] = {}  # reads not reported LATE, oldest first
        self._next_id = 0
        self._read_deadline_s, self._write_queue_s = read_deadline_s, write_queue_s
        self._mean_write_s = 0.0
        self._num_failures = 0  # writes failed in a row
        self._paused_until_s = 0.0
        self._closed = False
        self._mailbox = Mailbox[Job]()
        queue = partial(IoQueue, num_threads=num_threads, mailbox=self._mailbox, clock=clock)
        self._writes: IoQueue = queue(
            "disk-write",
            limit_s=write_queue_s,
            expired_fault=WRITE_DROPPED,
            run=lambda job: files.write(job, self._writes.queued_slots),
            idle=files.flush,
        )
        self._reads = queue(
            "disk-read", limit_s=read_deadline_s, expired_fault=READ_LATE, run=files.read
        )

    @property
    def direct_io(self) -> bool:
        """Whether transfers go past the page cache."""
        return self._files.slab.direct_io

    # Called by the engine

    def lookup(self, keys: Sequence[bytes], *, may_ask: bool = True) -> list[Answer]:
        """See `Tier`. Never PENDING."""
        return [Answer.HIT if self._stored(key) else Answer.MISS for key in keys]

    def submit_write(self, key: bytes, payload: memoryview, *, must: bool = False) -> int | None:
        """See `Tier`. `payload` is `slot_bytes` long; page-aligned, or direct I/O ends."""
        assert payload.nbytes == self.slot_bytes, (payload.nbytes, self.slot_bytes)
        if (block := self._blocks.get(key)) is not None:
            block.is_wanted = True
            self._order.touch(key)
            return None
        slot = self._take_slot() if self._accepts_writes() else None
        if slot is None:
            self._faults[WRITE_DROPPED] += 1
            return None
        job = self._new_job(key, slot, payload)
        self._blocks[key] = self._moving[job.transfer_id] = _Block(slot)
        self._writes.submit(job)
        return job.transfer_id

    def submit_read(self, key: bytes, into: memoryview) -> int:
        """See `Tier`. `into` is `slot_bytes` long; its content is undefined unless OK."""
        assert into.nbytes == self.slot_bytes, (into.nbytes, self.slot_bytes)
        block = self._stored(key)
        if block is None or block.checksum is None or self._closed:
            job = self._new_job(key, 0, into)
            job.faults.append("disk_missing")
            self._mailbox.put(job)
            return job.transfer_id
        job = self._new_job(key, block.slot, into)
        job.checksum = block.checksum
        block.num_readers += 1
        self._order.touch(key)
        self._moving[job.transfer_id] = block
        self._on_time[job.transfer_id] = job
        self._reads.submit(job)
        return job.transfer_id

    def touch(self, keys: Sequence[bytes], *, came_back: bool = False) -> Sequence[bytes]:
        """See `Tier`."""
        for key in keys:
            self._order.touch(key)
        return ()

    def newest_keys(self, limit: int) -> list[bytes]:
        """See `Tier`."""
        return list(self._order)[::-1][:limit]

    def discard(self, keys: Sequence[bytes]) -> None:
        """See `Tier`. Blocks for one commit to the index, so that a restart finds none of them."""
        stored = {key: block for key in keys if (block := self._stored(key)) is not None}
        if stored:
            self._files.forget([block.slot for block in stored.values()])
        for key, block in stored.items():
            self._forget(key, block)
        for key in keys:
            if (block := self._blocks.get(key)) is not None:
                block.is_wanted = False

    def poll(self) -> list[Completion]:
        """See `Tier`."""
        self._writes.expire()
        self._reads.expire()
        completions = [self._settle(job) for job in self._mailbox.take()]
        late_s = self._clock.now() - self._read_deadline_s
        while (job := next(iter(self._on_time.values()), None)) and job.submitted_s < late_s:
            del self._on_time[job.transfer_id]
            self._faults[READ_LATE] += 1
            completions.append(Completion(job.transfer_id, job.key, CompletionStatus.LATE))
        return completions

    def wait(self, timeout_s: float) -> None:
        """See `Tier`."""
        oldest = next(iter(self._on_time.values()), None)
        events_s = [
            self._writes.next_expiry_s(),
            oldest.submitted_s + self._read_deadline_s if oldest else None,
        ]
        now_s = self._clock.now()
        waits_s = [event_s - now_s for event_s in events_s if event_s is not None]
        self._mailbox.wait(max(0.0, min([timeout_s, *waits_s])))

    def usage(self) -> TierUsage:
        """See `Tier`."""
        faults = self._faults + Counter({"disk_index_failed": self._files.index.num_failures})
        return TierUsage(len(self._order), self.capacity_payloads, dict(faults))

    def close(self) -> None:
        """Drop what is queued, wait for what runs (5 seconds at most), keep what is stored.

        `poll` still reports what ended. Where a transfer is stuck, its buffer stays in use and the
        folder locked until the process ends.
        """
        if self._closed:
            return
        self._closed = True
        writes_ended = self._writes.close(_CLOSE_S / 2)
        if self._reads.close(_CLOSE_S / 2) and writes_ended:
            self._files.close()

    def check(self) -> None:
        """Assert that each slot is free, stored, being written or read after a drop: just one.

        And that the index says the same as the entries.
        """
        stored = {key: block for key, block in self._blocks.items() if block.checksum is not None}
        moving = Counter(id(block) for block in self._moving.values())
        known = {id(block): block for block in [*self._blocks.values(), *self._moving.values()]}
        slots = sorted([*self._free, *(block.slot for block in known.values())])
        assert slots == list(range(self.capacity_payloads)), slots
        assert sorted(self._order) == sorted(stored)
        assert self._on_time.keys() <= self._moving.keys()
        for key, block in stored.items():
            assert block.is_wanted
            if block.num_readers == 0:  # a read that fails removes the row ahead of `poll`
                assert self._files.rows[block.slot].key == key
        for number, block in known.items():
            assert moving[number] == block.num_readers + (block.checksum is None)

    def _accepts_writes(self) -> bool:
        wait_s = len(self._writes) * self._mean_write_s / self._writes.num_threads
        return (
            not self._closed
            and self._clock.now() >= self._paused_until_s
            and wait_s <= self._write_queue_s
        )

    def _take_slot(self) -> int | None:
        """A slot to write, evicting if none is free; None where all are in use."""
        if self._free:
            return self._free.popleft()
        key = self._order.victim(lambda key: self._blocks[key].num_readers > 0)
        if key is None:
            return None
        self._tell(key, is_there=False)
        return self._blocks.pop(key).slot

    def _stored(self, key: bytes) -> _Block | None:
        """The block of a key, where it can be read."""
        block = self._blocks.get(key)
        return None if block is None or block.checksum is None else block

    def _forget(self, key: bytes, block: _Block) -> None:
        """Find a stored block no more; its slot is free once no read of it runs."""
        self._order.remove(key)
        self._tell(key, is_there=False)
        del self._blocks[key]
        if block.num_readers == 0:
            self._free.append(block.slot)

    def _tell(self, key: bytes, *, is_there: bool) -> None:
        if self.on_change is not None:
            self.on_change(key, is_there)

    def _new_job(self, key: bytes, slot: int, buffer: memoryview) -> Job:
        self._next_id += 1
        return Job(self._next_id, key, slot, buffer.cast("B"), self._clock.now())

    def _settle(self, job: Job) -> Completion:
        """Do the books for an ended job."""
        self._faults.update(job.faults)
        job.buffer.release()  # the caller's own view stays
        block = self._moving.pop(job.transfer_id, None)
        if block is not None and block.checksum is None:
            self._settle_write(job, block)
        elif block is not None:
            self._settle_read(job, block)
        status = CompletionStatus.OK if job.ok else CompletionStatus.FAILED
        return Completion(job.transfer_id, job.key, status)

    def _settle_read(self, job: Job, block: _Block) -> None:
        self._on_time.pop(job.transfer_id, None)
        block.num_readers -= 1
        is_stored = self._blocks.get(job.key) is block
        if is_stored and not job.ok and READ_LATE not in job.faults:
            self._forget(job.key, block)
        elif not is_stored and block.num_readers == 0:
            self._free.append(block.slot)

    def _settle_write(self, job: Job, block: _Block) -> None:
        if job.ok and block.is_wanted:
            block.checksum = job.checksum
            self._order.admit(job.key)
            self._tell(job.key, is_there=True)
        else:
            if job.ok:
                self._files.forget([job.slot])
            del self._blocks[job.key]
            self._free.append(job.slot)
        if job.ok:
            self._num_failures = 0
            weight = 0.1 if self._mean_write_s else 1.0
            self._mean_write_s += weight * (job.service_s - self._mean_write_s)
        elif WRITE_DROPPED not in job.faults:
            self._num_failures += 1
            if self._num_failures >= _FAILURES_TO_PAUSE:
                self._paused_until_s = self._clock.now() + _PAUSE_S
                self._writes.drop_all()
