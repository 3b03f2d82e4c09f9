"""What one rank of `probe_ranks` measures, at the same time as the others.

All ranks make the same calls in the same order: how often each is repeated is rank 0's choice.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed

from hotset.layout import Layout
from hotset.parallel import collectives
from hotset.parallel.group import Group, agreed, find_store, join

KIB, MIB = 2**10, 2**20
_PER_GRAPH = 20  # calls that are recorded together, as steps have them
_LEAST_CALLS, _MOST_CALLS = 3, 50
_SENT = "figures are sent"

# PyTorch 2.13 has another name for it, and warns of the older one.
_reduce_scatter = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        sizes: bytes of messages.
        copy_bytes: of a copy over a link.
        figure_s: time that each figure may take.
    """

    sizes: tuple[int, ...] = tuple(4 * KIB * 4**n for n in range(8))
    copy_bytes: int = 256 * MIB
    figure_s: float = 0.15


def measure(
    rank: int,
    device: str,
    count: int,
    port: int,
    timeout_s: float,
    effort: Effort,
    to: Connection,
    errors: str,
) -> None:
    """Be one of `count` ranks; rank 0 sends the figures of all through `to`. Never returns.

    What it writes to stderr goes to the file `errors`, with the rank behind its name.
    """
    os.dup2(os.open(f"{errors}{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    torch.set_num_threads(1)
    store = find_store(port, count, timeout_s)
    group = join(store, rank, Layout(tp=count), device, timeout_s)
    figures = _Figures(group, effort).all()
    if rank == 0:
        to.send(figures)
        store.set(_SENT, "")
    store.wait([_SENT])  # a rank that ends earlier would break collectives of the others
    # Without what Python does at its end, which aborts where a thread of gloo lets go of a tensor.
    os._exit(0)


class _Figures:
    """The figures of one group of ranks; every method is called by all ranks."""

    def __init__(self, group: Group, effort: Effort) -> None:
        self._group = group
        self._effort = effort
        self._on_gpu = group.device.type == "cuda"

    def all(self) -> dict[str, Any]:
        """The part of a profile for this number of ranks."""
        links = self._links()
        note = collectives.use_symmetric_memory()
        times = {"all_reduce_us": self._times(self._all_reduce)}
        if note:
            collectives.forget_symmetric_memory()
            times["nccl_all_reduce_us"] = self._times(self._all_reduce)
        times["all_gather_us"] = self._times(self._all_gather)
        times["reduce_scatter_us"] = self._times(self._reduce_scatter)
        both = [links[way]["together"] for way in ("up", "down")]
        how = "in CUDA graphs of 20 calls" if self._on_gpu else "gloo"
        return {
            "source": f"hotset probe: {self._group.size} ranks at once, {note or how}",
            "host_link_gb_per_s": min(min(rates) for rates in both),
            "links_gb_per_s": links,
            "peer_copies_gb_per_s": self._peer_copies(),
            **times,
        }

    # -- links --------------------------------------------------------------------------------

    def _links(self) -> dict[str, dict[str, list[float]]]:
        """GB/s of each rank's link, by way: each rank alone, and all at once."""
        size = self._effort.copy_bytes
        host = [torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        device = [torch.zeros_like(part, device=self._group.device) for part in host]
        up, down = self._stream(), self._stream()

        def copy(ways: tuple[str, ...]) -> None:
            if "up" in ways:
                with torch.cuda.stream(up):  # none on a CPU
                    device[0].copy_(host[0], non_blocking=True)
            if "down" in ways:
                with torch.cuda.stream(down):
                    host[1].copy_(device[1], non_blocking=True)

        by_way = {"up": ("up",), "down": ("down",), "both": ("up", "down")}
        return {
            name: self._rates(functools.partial(copy, ways), size * len(ways))
            for name, ways in by_way.items()
        }

    def _peer_copies(self) -> dict[str, list[float]]:
        """GB/s from each rank's GPU to the next one's: one at a time, and all at once."""
        if not self._on_gpu:
            return {}
        size = self._effort.copy_bytes
        after = torch.device("cuda", (self._group.rank + 1) % self._group.size)
        source = torch.zeros(size, dtype=torch.uint8, device=self._group.device)
        target = torch.zeros_like(source, device=after)
        return self._rates(lambda: target.copy_(source, non_blocking=True), size)

    def _rates(self, run: Run, num_bytes: int) -> dict[str, list[float]]:
        """GB/s of each rank: while the others wait, and of all at once."""
        alone = 0.0
        for turn in range(self._group.size):
            distributed.barrier()
            if turn == self._group.rank:
                alone = self._rate(run, num_bytes)
        distributed.barrier()
        together = self._rate(run, num_bytes)
        return {"alone": self._of_all(alone), "together": self._of_all(together)}

    def _rate(self, run: Run, num_bytes: int) -> float:
        """GB/s of calls in a row for the time of a figure, so that ranks' copies overlap."""
        run()
        self._wait()
        calls, started = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - started < 2 * self._effort.figure_s:
            run()
            self._wait()
            calls += 1
        return calls * num_bytes / (time.perf_counter() - started) / 1e9

    def _of_all(self, value: float) -> list[float]:
        """The value of each rank, to four digits."""
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(self._group.size)]
        distributed.all_gather(values, torch.tensor([value], dtype=torch.float64))
        return [float(f"{float(each):.4g}") for each in values]

    def _stream(self) -> Any:
        return torch.cuda.Stream() if self._on_gpu else None

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    # -- collectives --------------------------------------------------------------------------

    def _times(self, prepare: Callable[[int], Run]) -> dict[str, float]:
        """Microseconds of a collective by bytes, of the rank that waits longest."""
        return {
            str(size): float(f"{max(self._of_all(self._seconds(prepare(size)))) * 1e6:.4g}")
            for size in self._effort.sizes
        }

    def _all_reduce(self, num_bytes: int) -> Run:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=self._group.device)
        return lambda: collectives.all_reduce(x)

    def _all_gather(self, num_bytes: int) -> Run:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=self._group.device)
        out = x.new_zeros(self._group.size * len(x))
        return lambda: collectives.all_gather_pieces(out, x)

    def _reduce_scatter(self, num_bytes: int) -> Run:
        out = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=self._group.device)
        x = out.new_zeros(self._group.size * len(out))
        return lambda: _reduce_scatter(out, x)

    def _seconds(self, run: Run) -> float:
        """Median time of a call, recorded where steps are."""
        run()
        self._wait()
        calls_per_run = 1
        if self._on_gpu:
            run, calls_per_run = self._recorded(run), _PER_GRAPH
        distributed.barrier()
        first = self._timed(run)
        repeats = self._effort.figure_s / max(agreed(first), 1e-9)
        count = max(_LEAST_CALLS, min(_MOST_CALLS, int(repeats)))
        return statistics.median(self._timed(run) for _ in range(count)) / calls_per_run

    def _recorded(self, run: Run) -> Run:
        """The same call 20 times in a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # Not global, as threads of NCCL would spoil the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(_PER_GRAPH):
                run()
        return graph.replay

    def _timed(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started
