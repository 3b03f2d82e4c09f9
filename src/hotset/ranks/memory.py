"""What each rank has of the memory, and how fast its link is."""

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from hotset.metrics import RankMemory
from hotset.plan.text import gib, rows
from hotset.ranks.messages import Held, RankReport

_SMOOTHING = 0.2  # weight of the newest copy in a running mean


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads this rank's memory.

    Attributes:
        device: of the rank.
        host_bytes: of host memory that it has for KV and experts.
        disk_bytes: most that it may write to disk.
    """

    device: torch.device
    host_bytes: int
    disk_bytes: int

    def read(self) -> RankMemory:
        """As of now; waits for nothing."""
        if self.device.type == "cuda":
            name = f"{self.device} {torch.cuda.get_device_name(self.device)}"
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
            used_bytes = total_bytes - free_bytes
        else:
            name, total_bytes = "cpu", psutil.virtual_memory().total
            used_bytes = psutil.Process(os.getpid()).memory_info().rss
        return RankMemory(
            socket.gethostname(), name, used_bytes, total_bytes, self.host_bytes, self.disk_bytes
        )


class RanksMemory:
    """The memory of all ranks, as each reported it last; any thread may call it.

    Args:
        own: rank 0's.
    """

    def __init__(self, own: Meter) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._others: dict[int, RankMemory] = {}  # by _lock
        self._rates: dict[int, float] = {}  # by _lock

    def take(self, rank: int, report: RankReport) -> None:
        """Take note of what another rank has."""
        if isinstance(report, Held):
            with self._lock:
                self._others[rank] = report.memory

    def note_copy(self, rank: int, num_bytes: int, seconds: float) -> None:
        """Follow the rate of a rank's link with a copy from host memory."""
        rate = num_bytes / max(seconds, 1e-9)
        with self._lock:
            old = self._rates.setdefault(rank, rate)
            self._rates[rank] = old + _SMOOTHING * (rate - old)

    def read(self) -> tuple[RankMemory, ...]:
        """By rank."""
        own = self._own.read()
        with self._lock:
            found = [own, *(self._others[rank] for rank in sorted(self._others))]
            return tuple(
                replace(one, link_bytes_per_s=self._rates.get(rank, 0.0))
                for rank, one in enumerate(found)
            )


def ranks_table(memory: Sequence[RankMemory]) -> str:
    """What each rank has, and all of them together, as start prints it."""
    table: list[tuple[str, ...]] = [("rank", "device", "used", "of", "host memory", "disk at most")]
    for rank, one in enumerate(memory):
        sizes = (one.used_bytes, one.total_bytes, one.host_bytes, one.disk_bytes)
        table.append((str(rank), f"{one.device} on {one.host}", *map(gib, sizes)))
    sums = (sum(one.host_bytes for one in memory), sum(one.disk_bytes for one in memory))
    table.append(("all", "", "", "", *map(gib, sums)))
    return rows(table)
