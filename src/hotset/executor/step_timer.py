"""How long the device takes for a step."""

import time

import torch


class StepTimer:
    """How long the device takes for what is submitted between the start and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._seconds = -time.perf_counter()
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()

    def stop(self) -> None:
        """All was submitted."""
        self._seconds += time.perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """The time it took; waits for its end."""
        if not self._events:
            return self._seconds
        start, end = self._events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
