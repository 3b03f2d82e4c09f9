"""Copies as runs of bytes, and merging those that continue each other. Imports no torch."""

from collections.abc import Iterable
from typing import NamedTuple


class Run(NamedTuple):
    """Bytes to be copied, one way or the other. Both places are addresses."""

    device: int
    host: int
    num_bytes: int


def merge_runs(
    runs: Iterable[Run], *, host_start: int = 0, chunk_bytes: int | None = None
) -> list[Run]:
    """Sort runs by device address, and make one of those that continue each other on both sides.

    No run goes on past an address that lies a multiple of `chunk_bytes` after `host_start`.
    """
    merged: list[Run] = []
    for run in sorted(runs):
        if merged and (chunk_bytes is None or (run.host - host_start) % chunk_bytes):
            last = merged[-1]
            ends = (last.device + last.num_bytes, last.host + last.num_bytes)
            if ends == (run.device, run.host):
                merged[-1] = Run(last.device, last.host, last.num_bytes + run.num_bytes)
                continue
        merged.append(run)
    return merged
