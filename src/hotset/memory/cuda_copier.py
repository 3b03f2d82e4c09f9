"""Copies between a GPU's block pool and pinned host memory, on streams of their own."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from hotset.errors import ConfigError
from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.copy_runs import merge_runs

_PIN_CHUNK_BYTES = 64 * 2**30


class CudaCopier:
    """A `transfer.Copier` of two streams, one a direction, so that both run at once.

    A batch waits on the device for the compute that was submitted before it; the host learns of
    its end by an event, so nothing ever waits for a copy that it does not need. Runs of adjacent
    blocks in adjacent slots are one copy.
    """

    def __init__(self, device: DeviceArena, host: HostArena) -> None:
        self._device = device.bytes_view_tensor()
        self._host = torch.from_numpy(host.slots)[:, : device.block_bytes]
        self._pinned = [host]  # keeps the memory alive
        for start in range(0, self._host_bytes(host), _PIN_CHUNK_BYTES):
            num_bytes = min(_PIN_CHUNK_BYTES, self._host_bytes(host) - start)
            _pin(host.slots.ctypes.data + start, num_bytes)
        self._down = torch.cuda.Stream(self._device.device)
        self._up = torch.cuda.Stream(self._device.device)
        self._running: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._next_id = 0

    def submit(self, pairs: Sequence[tuple[int, int]], *, to_host: bool) -> int:
        """Start a batch after the compute submitted so far."""
        stream = self._down if to_host else self._up
        stream.wait_stream(torch.cuda.current_stream(self._device.device))
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record()
            for block, slot, count in merge_runs(pairs):
                device = self._device[block : block + count]
                host = self._host[slot : slot + count]
                if to_host:
                    host.copy_(device, non_blocking=True)
                else:
                    device.copy_(host, non_blocking=True)
            end.record()
        self._next_id += 1
        self._running.append((self._next_id, start, end))
        return self._next_id

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
        """Wait for the copies and unpin the memory."""
        self._down.synchronize()
        self._up.synchronize()
        self._running.clear()
        for host in self._pinned:
            for start in range(0, self._host_bytes(host), _PIN_CHUNK_BYTES):
                torch.cuda.cudart().cudaHostUnregister(host.slots.ctypes.data + start)
        self._pinned.clear()

    @staticmethod
    def _host_bytes(host: HostArena) -> int:
        return int(host.slots.nbytes)


def _pin(address: int, num_bytes: int) -> None:
    code: Any = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
    if int(code) != 0:
        raise ConfigError(
            f"{num_bytes / 2**30:.2f} GiB of host memory cannot be pinned (CUDA error "
            f"{int(code)}); give less host_gib or raise the limit on locked memory"
        )
