"""The copier of a device pool in CPU memory, and which copier a pool needs."""

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.copy_runs import Run
from hotset.memory.cuda_copier import CudaCopier
from hotset.memory.mover import Copier


class ThreadCopier:
    """A `mover.Copier` of one thread. numpy copies without the GIL."""

    def __init__(self, device: np.ndarray, host: np.ndarray) -> None:
        self._device, self._host = device.reshape(-1), host.reshape(-1)
        self._device_start = int(device.ctypes.data)
        self._host_start = int(host.ctypes.data)
        self.num_ready_slots = len(host)
        self._jobs: queue.SimpleQueue[tuple[int, list[Run], bool] | None] = queue.SimpleQueue()
        self._ended: deque[tuple[int, float]] = deque()
        self._something_ended = threading.Event()
        self._next_id = 0
        self._thread = threading.Thread(target=self._run, name="hotset-copy", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Compute that was submitted has ended: nothing to note."""

    def submit(self, runs: Sequence[Run], *, to_host: bool) -> int:
        """Queue a batch; batches run in order."""
        self._next_id += 1
        self._jobs.put((self._next_id, list(runs), to_host))
        return self._next_id

    def order(self, copy_id: int) -> bool:
        """Nothing but the host waits for this thread."""
        return False

    def poll(self) -> list[tuple[int, float]]:
        """Ids that ended since the last call, with the seconds each took."""
        self._something_ended.clear()
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def wait(self, timeout_s: float) -> None:
        """Block until something can be polled, or `timeout_s` has passed."""
        self._something_ended.wait(timeout_s)

    def close(self) -> None:
        """Finish the queued batches and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            copy_id, runs, to_host = job
            start_s = time.perf_counter()
            for run in runs:
                first = run.device - self._device_start
                device = self._device[first : first + run.num_bytes]
                first = run.host - self._host_start
                host = self._host[first : first + run.num_bytes]
                if to_host:
                    host[:] = device
                else:
                    device[:] = host
            self._ended.append((copy_id, time.perf_counter() - start_s))
            self._something_ended.set()


def make_copier(device: DeviceArena, host: HostArena) -> Copier:
    """The copier for where the pool is."""
    if device.storage.device.type == "cuda":
        return CudaCopier(device, host)
    return ThreadCopier(device.memory.numpy(), host.slots)
