"""A rank's part of the blocks on disk: bytes alone, as rank 0 has the index.

Imports no torch.
"""

from pathlib import Path

from hotset.memory.disk.folder import opening
from hotset.memory.disk.slab import Slab, checksum
from hotset.ranks.messages import Moved


class RankSlab:
    """The slab of a rank that has no index. Reads and writes are safe from any thread.

    Args:
        folder: created where missing; one process at a time.
        slot_bytes: of one block's part.
        num_slots: of the slab.

    Raises:
        TierError: no space, in use, or not writable.
    """

    def __init__(self, folder: Path, *, slot_bytes: int, num_slots: int) -> None:
        with opening(folder, f"disk tier folder {folder}") as (self._lock, _):
            self._slab = Slab(
                folder / "blocks.slab", slot_bytes=slot_bytes, num_slots=num_slots, clear=False
            )

    def write(self, number: int, slot: int, key: bytes, payload: memoryview) -> Moved:
        """Write one slot; the report of it."""
        found = checksum(key, payload)
        try:
            self._slab.write(slot, payload)
        except OSError as error:
            return Moved(number, found, f"io_error: {error.strerror}")
        return Moved(number, found, "")

    def read(self, number: int, slot: int, key: bytes, into: memoryview) -> Moved:
        """Read one slot; the report has the checksum of what was read."""
        try:
            self._slab.read(slot, into)
        except EOFError:
            return Moved(number, 0, "truncated")
        except OSError:
            return Moved(number, 0, "io_error")
        return Moved(number, checksum(key, into), "")

    def close(self) -> None:
        """Close the file, which keeps what is stored. No transfer may be running."""
        self._slab.close()
        self._lock.close()
