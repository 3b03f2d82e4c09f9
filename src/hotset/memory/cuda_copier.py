"""Copies between a GPU's memory and pinned host memory, on streams of their own."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from hotset.cost.tuning import TUNINGS
from hotset.errors import ConfigError
from hotset.memory.arena import HostArena
from hotset.memory.copy_runs import Run, merge_runs
from hotset.memory.pin import pin, unpin

_log = logging.getLogger(__name__)

# Between chunks that are pinned, for launches that wait for the driver's lock meanwhile.
_PIN_PAUSE_S = 2e-3
# Threads that touch the pages before they are pinned: the operating system clears each first.
_TOUCH_THREADS = 4


class CudaCopier:
    """A `mover.Copier` of two streams, one per direction, so that both run at once.

    A batch waits on the device for the compute that was submitted before `mark`; the host learns
    of its end by an event, so nothing ever waits for a copy that it does not need. Runs that
    continue each other are one copy, and many copies one submission.

    Host memory is pinned chunk by chunk in a thread: `num_ready_slots` says how far it is.

    Args:
        memories: uint8 of one GPU, where its runs are.
        host: the slots.

    Raises:
        ConfigError: not even the first chunk can be pinned.
    """

    def __init__(self, memories: Sequence[torch.Tensor], host: HostArena) -> None:
        self._memories = [memory.view(-1) for memory in memories]
        self._device = memories[0].device
        self._host = torch.from_numpy(host.slots).view(-1)
        self._tuning = TUNINGS["cuda"]
        self._copy_batch = _find_batch_copy()
        self._down = torch.cuda.Stream(self._device)
        self._up = torch.cuda.Stream(self._device)
        self._marked = torch.cuda.Event()
        self._running: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._next_id = 0

        self._arena = host
        self._num_slots = len(host.slots)
        self._slots_per_chunk = max(1, self._tuning.pin_chunk_bytes // host.slot_bytes)
        self._is_closing = False
        self.num_ready_slots = 0
        host.use_huge_pages()
        self._pin_next_chunk()
        self._pinner = threading.Thread(target=self._pin_rest, name="hotset-pin", daemon=True)
        self._pinner.start()

    def mark(self) -> None:
        """Note the compute submitted so far, for `submit`."""
        self._marked.record(torch.cuda.current_stream(self._device))

    def submit(self, runs: Sequence[Run], *, to_host: bool) -> int:
        """Start a batch after the compute submitted before the last `mark`."""
        stream = self._down if to_host else self._up
        stream.wait_event(self._marked)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        chunk_bytes = self._slots_per_chunk * self._arena.slot_bytes
        runs = merge_runs(runs, host_start=self._arena.address(0), chunk_bytes=chunk_bytes)
        start.record(stream)
        if self._copy_batch is not None:
            for first in range(0, len(runs), self._tuning.copies_per_call):
                devices, hosts, sizes = map(
                    list, zip(*runs[first : first + self._tuning.copies_per_call], strict=True)
                )
                targets, sources = (hosts, devices) if to_host else (devices, hosts)
                self._copy_batch(targets, sources, sizes, stream.cuda_stream)
        else:
            with torch.cuda.stream(stream):
                for run in runs:
                    self._copy(run, to_host=to_host)
        end.record(stream)
        self._next_id += 1
        self._running.append((self._next_id, start, end))
        return self._next_id

    def order(self, copy_id: int) -> bool:
        """Have compute submitted from here on wait for a copy on the device."""
        for running_id, _, end in self._running:
            if running_id == copy_id:
                torch.cuda.current_stream(self._device).wait_event(end)
        return True

    def poll(self) -> list[tuple[int, float]]:
        """Ids that ended since the last call, with the seconds each took on the link."""
        ended = [(i, start, end) for i, start, end in self._running if end.query()]
        done = {i for i, _, _ in ended}
        self._running = [entry for entry in self._running if entry[0] not in done]
        return [(i, start.elapsed_time(end) / 1e3) for i, start, end in ended]

    def wait(self, timeout_s: float) -> None:
        """Block until something can be polled, or `timeout_s` has passed."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and self._running:
            if any(end.query() for _, _, end in self._running):
                return
            time.sleep(2e-5)

    def close(self) -> None:
        """Wait for the copies, and for steps that read the memory, and unpin it."""
        self._is_closing = True
        self._pinner.join()
        torch.cuda.synchronize(self._device)
        self._running.clear()
        for first in range(0, self.num_ready_slots, self._slots_per_chunk):
            unpin(self._arena.address(first))
        self.num_ready_slots = 0

    def _copy(self, run: Run, *, to_host: bool) -> None:
        """One copy on the current stream."""
        memory = next(
            memory
            for memory in self._memories
            if 0 <= run.device - memory.data_ptr() < memory.nbytes
        )
        first = run.device - memory.data_ptr()
        device = memory[first : first + run.num_bytes]
        first = run.host - self._arena.address(0)
        host = self._host[first : first + run.num_bytes]
        target, source = (host, device) if to_host else (device, host)
        target.copy_(source, non_blocking=True)

    def _pin_next_chunk(self) -> None:
        """Touch and pin the next chunk of slots.

        Raises:
            ConfigError: it cannot be pinned; the slots before it can be used.
        """
        first = self.num_ready_slots
        last = min(first + self._slots_per_chunk, self._num_slots)
        self._arena.commit(first, last, num_threads=_TOUCH_THREADS)
        num_bytes = (last - first) * self._arena.slot_bytes
        if code := pin(self._arena.address(first), num_bytes):
            raise ConfigError(
                f"{self._gib(last):.2f} GiB of host memory cannot be pinned (CUDA error {code}, "
                f"{self._gib(first):.2f} GiB are); give less host_gib or raise the limit on locked "
                "memory"
            )
        self.num_ready_slots = last

    def _pin_rest(self) -> None:
        torch.cuda.set_device(self._device)  # of this thread, whose own would be the first
        try:
            while self.num_ready_slots < self._num_slots and not self._is_closing:
                self._pin_next_chunk()
                time.sleep(_PIN_PAUSE_S)
        except ConfigError as error:
            _log.warning("the host tier is smaller than asked for: %s", error)

    def _gib(self, num_slots: int) -> float:
        return num_slots * self._arena.slot_bytes / 2**30


def _find_batch_copy() -> Any:
    """A function that submits many copies at once (CUDA 13), or None where there is none."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    if not torch.version.cuda or int(torch.version.cuda.split(".")[0]) < 13:
        return None
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream

    def copy(targets: list[int], sources: list[int], sizes: list[int], stream: int) -> None:
        (code,) = runtime.cudaMemcpyBatchAsync(
            targets, sources, sizes, len(sizes), [attributes], [0], 1, stream
        )
        if int(code) != 0:
            raise RuntimeError(f"copies between host and device failed: {code}")

    return copy
