"""The copier of a device pool in CPU memory, and which copier a pool needs."""

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from hotset.memory.arena import HostArena
from hotset.memory.copy_runs import Run
from hotset.memory.cuda_copier import CudaCopier
from hotset.memory.mover import Copier


class ThreadCopier:
    """A `mover.Copier` of one thread. numpy copies without the GIL.

    Args:
        memories: uint8, where the device's runs are.
        host: uint8 `[num_slots, slot_bytes]`.
    """

    def __init__(self, memories: Sequence[np.ndarray], host: np.ndarray) -> None:
        self._memories = [memory.reshape(-1) for memory in memories]
        self._host = host.reshape(-1)
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
                device = self._find(run)
                first = run.host - self._host_start
                host = self._host[first : first + run.num_bytes]
                if to_host:
                    host[:] = device
                else:
                    device[:] = host
            self._ended.append((copy_id, time.perf_counter() - start_s))
            self._something_ended.set()

    def _find(self, run: Run) -> np.ndarray:
        """The bytes of a run on the device."""
        for memory in self._memories:
            first = run.device - int(memory.ctypes.data)
            if 0 <= first < len(memory):
                return memory[first : first + run.num_bytes]
        raise AssertionError("a run is in no memory of the device")


def make_copier(memories: Sequence[torch.Tensor], host: HostArena) -> Copier:
    """The copier for where the device's memories, uint8, are."""
    if memories[0].is_cuda:
        return CudaCopier(memories, host)
    return ThreadCopier([memory.numpy() for memory in memories], host.slots)
