"""The slab file: one preallocated file of equal slots, read and written past the page cache."""

import errno
import fcntl
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from hotset.errors import TierError

SLOT_ALIGN_BYTES = 4096  # O_DIRECT wants buffer, offset and length in multiples of a disk sector

_Call = Callable[[int, Sequence[memoryview], int], int]


def slot_bytes_for(payload_bytes: int) -> int:
    """Bytes a payload takes in the slab, and the length of every buffer given to the tier."""
    return -(-payload_bytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


def checksum(key: bytes, payload: memoryview) -> int:
    """CRC-32 of key and payload.

    Chosen by measuring what the standard library has, in GB/s over a 2 MiB block on one core of an
    AMD EPYC: crc32 6.2, adler32 3.6, sha1 2.0, sha256 1.9, blake2b 0.9. The disk there writes 1.9,
    so any hash but the CRC would be the bottleneck. It has to catch accidents, not an adversary
    (who could write the index as well): it sees every burst of up to 32 bits and misses other
    damage once in 2**32 damaged blocks. It covers the key because a row that names another
    block's slot together with its checksum would pass otherwise.
    """
    return zlib.crc32(payload, zlib.crc32(key))


class FolderLock:
    """Holds a folder for this process until closed or until the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise TierError(
                f"disk tier folder {folder} is in use by process {owner}; "
                "stop that process or give another folder"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._fd)


class Slab:
    """`num_slots` slots of `slot_bytes` in one file. Reads and writes are safe from any thread.

    Every byte is allocated when it is opened, so that a disk that fills up later does not fail a
    write here. What was in the file stays, except beyond its new end and with `clear=True`.

    Attributes:
        direct_io: whether transfers go past the page cache. Becomes False for good when the file
            system or a buffer's alignment does not allow it.

    Raises:
        TierError: not enough space; a file that was there is unchanged.
        OSError: the file cannot be opened or sized.
    """

    def __init__(self, path: Path, *, slot_bytes: int, num_slots: int, clear: bool) -> None:
        assert slot_bytes % SLOT_ALIGN_BYTES == 0, slot_bytes
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        require_space(path, slot_bytes * num_slots)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._direct_fd: int | None = None
        try:
            found_bytes = os.fstat(self._fd).st_size
            if clear:
                os.ftruncate(self._fd, 0)
            self._allocate(path, 0 if clear else found_bytes)
            # A file system without O_DIRECT refuses the flag here, or a transfer later.
            if hasattr(os, "O_DIRECT"):
                try:
                    self._direct_fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                        raise
        except BaseException:
            os.close(self._fd)
            raise
        self.direct_io = self._direct_fd is not None

    def _allocate(self, path: Path, found_bytes: int) -> None:
        size = self.slot_bytes * self.num_slots
        try:
            os.ftruncate(self._fd, size)
            if hasattr(os, "posix_fallocate"):  # not on macOS, where the file stays sparse
                os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            os.ftruncate(self._fd, min(found_bytes, size))
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_space(path, size, _free_bytes(path)) from error
            raise

    def write(self, slot: int, payload: memoryview) -> None:
        """Write one slot. Raises OSError; the slot's content is undefined then."""
        done = 0
        while done < self.slot_bytes:
            offset = slot * self.slot_bytes + done
            count = self._transfer(os.pwritev, payload[done:], offset)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            done += count

    def read(self, slot: int, into: memoryview) -> None:
        """Read one slot. Raises OSError, or EOFError where the file ends before the slot does."""
        done = 0
        while done < self.slot_bytes:
            offset = slot * self.slot_bytes + done
            count = self._transfer(os.preadv, into[done:], offset)
            if count == 0:
                raise EOFError(f"the slab ends inside slot {slot}")
            done += count

    def read_checked(
        self,
        slot: int,
        into: memoryview,
        key: bytes,
        expected: int,
        others: Callable[[int], int] | None = None,
    ) -> str | None:
        """Read one slot, and compare it with its checksum; returns what went wrong.

        That is `truncated`, `io_error` or `corrupt`. `others` makes of the checksum found here that
        of more parts of the block; see `block_files.Peers`.
        """
        fault, found = None, 0
        try:
            self.read(slot, into)
            found = checksum(key, into)
        except EOFError:
            fault = "truncated"
        except OSError:
            fault = "io_error"
        if others is not None:  # also after a fault: they use their buffers until then
            try:
                found = others(found)
            except OSError:
                fault = fault or "io_error"
        return fault or (None if found == expected else "corrupt")

    def _transfer(self, call: _Call, buffer: memoryview, offset: int) -> int:
        if self.direct_io and self._direct_fd is not None:
            try:
                return call(self._direct_fd, [buffer], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct_io = False  # slots are whole pages, so both ways may mix
        return call(self._fd, [buffer], offset)

    def close(self) -> None:
        """Close the file. No transfer may be running."""
        os.close(self._fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)


def require_space(path: Path, size_bytes: int) -> None:
    """Raise TierError unless the file at `path` can become `size_bytes` long."""
    try:
        allocated_bytes = path.stat().st_blocks * 512
    except FileNotFoundError:
        allocated_bytes = 0
    available_bytes = _free_bytes(path) + allocated_bytes
    if size_bytes > available_bytes:
        raise _no_space(path, size_bytes, available_bytes)


def _free_bytes(path: Path) -> int:
    stat = os.statvfs(path.parent)
    return stat.f_bavail * stat.f_frsize


def _no_space(path: Path, asked_bytes: int, available_bytes: int) -> TierError:
    return TierError(
        f"disk tier asks for {asked_bytes / 1e9:.3f} GB in {path.parent}, "
        f"where {available_bytes / 1e9:.3f} GB can be had; "
        "ask for less, or give a folder on a larger disk"
    )
