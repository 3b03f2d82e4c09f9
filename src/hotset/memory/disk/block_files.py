"""What a disk tier has on disk: a slab, and the index that says which block is in which slot."""

import errno
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from hotset.clock import Clock
from hotset.memory.disk.folder import opening
from hotset.memory.disk.index import BASE_BYTES, BATCH_ROWS, ROW_BYTES, BlockIndex, IndexFault
from hotset.memory.disk.io_queue import Job
from hotset.memory.disk.slab import Slab, checksum, require_space, slot_bytes_for

_FORMAT = "1"  # of slab and index; another one is not read
_KIND_BY_ERRNO = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EFBIG: "disk_full",
    errno.EROFS: "disk_read_only",
    errno.EBADF: "disk_read_only",
    errno.EACCES: "disk_read_only",
    errno.EPERM: "disk_read_only",
}


class Peers(Protocol):
    """The other parts of each block, which other ranks write to slots of the same number.

    Each method returns a function, to be called with the checksum of the part here. It waits for
    the other ranks and returns the checksum of all parts, or raises OSError.
    """

    def write(self, slot: int, key: bytes, payload: memoryview) -> Callable[[int], int]:
        """Start writing the parts whose host slot is that of `payload`."""
        ...

    def read(self, slot: int, key: bytes, into: memoryview) -> Callable[[int], int]:
        """Start reading them."""
        ...


class BlockFiles:
    """Blocks in slots, found again after a restart. Safe from any thread; all calls block.

    Crash safety: a slot's row is removed from the index, committed, before the slot is written
    (one transaction covers the slots of all queued writes), and added after it was. So after
    `kill -9` each row names a slot whose content is whole. A power cut may bring back older rows;
    those, and damage by others, fail their checksum: the read FAILED, the block is forgotten.

    Args:
        folder, payload_bytes, fingerprint, clock: see `DiskTier`.
        num_slots: of the slab.
        peers: have other parts of each block; None where all is here.

    Attributes:
        rows: of the index, by slot: what is stored.
        reclaimed: why blocks that were there were thrown away, or None.
        faults: what was found wrong when it was opened, by kind.

    Raises:
        TierError: no space, in use, or not writable; what was there still is.
    """

    def __init__(
        self,
        folder: Path,
        num_slots: int,
        *,
        payload_bytes: int,
        fingerprint: Mapping[str, str],
        clock: Clock,
        peers: Peers | None = None,
    ) -> None:
        self._peers = peers
        slot_bytes = slot_bytes_for(payload_bytes)
        identity = {
            "format": _FORMAT,
            "payload_bytes": str(payload_bytes),
            **{f"fingerprint.{name}": value for name, value in fingerprint.items()},
        }
        slab_path, index_path = folder / "blocks.slab", folder / "index.sqlite"
        with opening(folder, f"disk tier folder {folder}") as (self._lock, undo):
            require_space(slab_path, num_slots * slot_bytes)  # before anything is thrown away
            found_bytes = slab_path.stat().st_size if slab_path.exists() else 0
            index_was_gone = found_bytes > 0 and not index_path.exists()
            found_slots = found_bytes // slot_bytes
            self.index = index = BlockIndex(
                index_path,
                identity=identity,
                num_slots=min(num_slots, found_slots),
                max_bytes=BASE_BYTES + num_slots * ROW_BYTES,
                clock=clock,
            )
            undo.callback(index.close)
            self.slab = Slab(
                slab_path, slot_bytes=slot_bytes, num_slots=num_slots, clear=not index.rows
            )
        self.rows = index.rows
        self.reclaimed = "the index was gone" if index_was_gone else index.empty_reason
        self.faults = Counter(
            disk_index_damaged=int(index_was_gone or index.damaged),
            disk_truncated=sum(row.slot >= found_slots for row in index.dropped),
        )
        self._clearing = threading.Lock()

    def write(self, job: Job, queued_slots: Callable[[int], list[int]]) -> bool:
        """Store a block in its slot; whether that went well.

        Args:
            job: gets its checksum, and its faults.
            queued_slots: the slots of the next writes, up to a number of them.
        """
        try:
            self._clear_row(job.slot, queued_slots)
            others = None
            if self._peers is not None:
                others = self._peers.write(job.slot, job.key, job.buffer)
            try:
                job.checksum = checksum(job.key, job.buffer)
                self.slab.write(job.slot, job.buffer)
            finally:
                if others:  # which use their buffers until then
                    job.checksum = others(job.checksum)
        except IndexFault:
            return False  # the index counts it
        except OSError as error:
            job.faults.append(_KIND_BY_ERRNO.get(error.errno or 0, "disk_io_error"))
            return False
        self.index.add(job.slot, job.key, job.checksum)
        if self.index.batch_is_full:
            self.flush()
        return True

    def _clear_row(self, slot: int, queued_slots: Callable[[int], list[int]]) -> None:
        """Remove the row of a slot about to be written, and those of the next ones with it.

        A slot's row is only ever added by the worker that has its job, after passing here: so
        with the lock, a row seen here is an old one.
        """
        if slot in self.rows:
            with self._clearing:
                others = [other for other in queued_slots(BATCH_ROWS - 1) if other in self.rows]
                self.index.remove([slot, *others])

    def read(self, job: Job) -> bool:
        """Read a block from its slot, and compare it with its checksum; whether that went well."""
        others = None
        if self._peers is not None:
            others = self._peers.read(job.slot, job.key, job.buffer)
        fault = self.slab.read_checked(job.slot, job.buffer, job.key, job.checksum, others)
        if fault is None:
            return True
        job.faults.append(f"disk_{fault}")
        self.forget([job.slot])  # pinned until polled, so the slot is not written meanwhile
        return False

    def forget(self, slots: Sequence[int]) -> None:
        """Remove the rows of slots, so that a restart does not find what is in them."""
        with suppress(IndexFault):  # counted; the next write to the slot removes its row
            self.index.remove(slots)

    def flush(self) -> None:
        """Commit the rows that were added."""
        with suppress(IndexFault):  # counted; what was added is kept for the next time
            self.index.flush()

    def close(self) -> None:
        """Keep what is stored, and let go of the folder."""
        with suppress(IndexFault):  # counted; the blocks of the last batch are not kept
            self.index.close()
        self.slab.close()
        self._lock.close()
