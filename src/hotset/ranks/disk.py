"""The other ranks' parts of blocks on disk, of which this one has the index."""

import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from hotset.memory.arena import HostArena
from hotset.ranks.driver import Ranks
from hotset.ranks.log import Op, command, key_numbers
from hotset.ranks.messages import Moved, RankReport


class RanksDisk:
    """See `disk.block_files.Peers`. Called from the threads of a disk tier, which wait here.

    Args:
        ranks: the others.
        host: rank 0's host slots, whose numbers are all ranks'.
    """

    def __init__(self, ranks: Ranks, host: HostArena) -> None:
        self._ranks, self._host = ranks, host
        self._lock = threading.Lock()
        self._open: dict[int, dict[int, Future[Moved]]] = {}  # by number and rank; by _lock
        self._number = 0  # by _lock

    def write(self, slot: int, key: bytes, payload: memoryview) -> Callable[[int], int]:
        """Start writing the others' parts of a host slot."""
        return self._start(Op.WRITE, slot, key, payload)

    def read(self, slot: int, key: bytes, into: memoryview) -> Callable[[int], int]:
        """Start reading into the others' parts of a host slot."""
        return self._start(Op.READ, slot, key, into)

    def _start(self, op: Op, slot: int, key: bytes, view: memoryview) -> Callable[[int], int]:
        start = int(np.frombuffer(view, np.uint8).ctypes.data) - self._host.address(0)
        waiting: dict[int, Future[Moved]] = {rank: Future() for rank in range(1, self._ranks.size)}
        with self._lock:
            self._number += 1
            number = self._number
            self._open[number] = waiting
        numbers = (number, start // self._host.slot_bytes, slot)
        self._ranks.send(command(op, numbers, key_numbers(key)))

        def end(checksum: int) -> int:
            """Wait for the others; the checksum of all parts, from rank 0's."""
            moved = [waiting[rank].result() for rank in sorted(waiting)]
            for rank, one in enumerate(moved, start=1):
                if one.fault:
                    raise OSError(0, f"rank {rank}: {one.fault}")
            parts = [checksum, *(one.checksum for one in moved)]
            return zlib.crc32(struct.pack(f"<{len(parts)}I", *parts))

        return end

    def take(self, rank: int, report: RankReport) -> None:
        """Take note of what ended on another rank."""
        if not isinstance(report, Moved):
            return
        with self._lock:
            waiting = self._open[report.number]
            if all(future.done() for other, future in waiting.items() if other != rank):
                del self._open[report.number]
        waiting[rank].set_result(report)
