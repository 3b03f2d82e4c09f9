"""A disk tier in which each key has a fixed place: written once, then only read."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hotset.clock import REAL_CLOCK
from hotset.memory.disk.folder import opening
from hotset.memory.disk.io_queue import IoQueue, Job
from hotset.memory.disk.slab import Slab, checksum
from hotset.memory.mailbox import Mailbox
from hotset.memory.tier import Completion, CompletionStatus, TierInfo


class FixedSlab:
    """Payloads in one file, which goes with `close`.

    `write` may be called from any thread; the rest is called by one. A read whose turn has not
    come within the deadline has FAILED; one that was begun ends when it ends.

    Args:
        folder: created where missing. One process at a time.
        file: its name in the folder.
        what: the store and its folder, as an error calls it.
        places: key -> its place in the file, from 0 on.
        payload_bytes: of each, in whole pages.
        num_threads: that read.
        read_deadline_s: see above.
        fault_prefix: before the kinds of faults: `_late`, `_truncated`, `_io_error`, `_corrupt`.

    Attributes:
        path: of the file.
        info: what the tier is.

    Raises:
        TierError: no space, in use, or not writable.
    """

    def __init__(
        self,
        folder: Path,
        *,
        file: str,
        what: str,
        places: Mapping[bytes, int],
        payload_bytes: int,
        num_threads: int,
        read_deadline_s: float,
        fault_prefix: str,
    ) -> None:
        self.path = folder / file
        self.info = TierInfo("disk", len(places), payload_bytes)
        with opening(folder, what) as (self._lock, _):
            self._slab = Slab(
                self.path, slot_bytes=payload_bytes, num_slots=len(places), clear=True
            )
        self._places = places
        self._sums: dict[bytes, int] = {}
        self._fault_prefix = fault_prefix
        self._next_id = 0
        self._mailbox = Mailbox[Job]()
        self._queue = IoQueue(
            f"{fault_prefix}-read",
            num_threads=num_threads,
            limit_s=read_deadline_s,
            expired_fault=f"{fault_prefix}_late",
            run=self._read,
            mailbox=self._mailbox,
        )

    def write(self, key: bytes, payload: memoryview) -> None:
        """Store a payload; blocks. Raises OSError."""
        self._sums[key] = checksum(key, payload)
        self._slab.write(self._places[key], payload)

    def submit_read(self, key: bytes, into: memoryview) -> int:
        """Start reading a payload into memory of whole pages; returns a transfer id."""
        self._next_id += 1
        job = Job(self._next_id, key, self._places[key], into, REAL_CLOCK.now())
        job.checksum = self._sums[key]
        self._queue.submit(job)
        return job.transfer_id

    def poll(self) -> list[Completion]:
        """The reads that ended since the last call."""
        self._queue.expire()
        return [
            Completion(
                job.transfer_id,
                job.key,
                CompletionStatus.OK if job.ok else CompletionStatus.FAILED,
                job.faults[-1] if job.faults else None,
            )
            for job in self._mailbox.take()
        ]

    def wait(self, timeout_s: float) -> None:
        """Block until something can be polled, or `timeout_s` has passed."""
        self._mailbox.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Drop queued reads, wait for those that run, and remove the file.

        Where one does not end in time, the folder stays locked until the process ends.
        """
        has_ended = self._queue.close(timeout_s)
        with suppress(OSError):  # gone already
            self.path.unlink()
        if has_ended:
            self._slab.close()
            self._lock.close()

    def _read(self, job: Job) -> bool:
        """In a worker."""
        fault = self._slab.read_checked(job.slot, job.buffer, job.key, job.checksum)
        if fault is not None:
            job.faults.append(f"{self._fault_prefix}_{fault}")
        return fault is None
