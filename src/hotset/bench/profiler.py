"""Where the time goes: some steps in the middle of a run, profiled.

First as many steps under Python's own profiler, which sees the scheduler and all else of the
host; then under torch's, which sees operators and kernels.
"""

import cProfile
import io
import pstats
import time
from typing import Any

import torch

_ROWS = 25
_START_SHARE = 0.5  # of the requests have ended
_START_STEPS = 500  # have run, where few requests have ended by then


class StepProfiler:
    """Profiles `num_steps` steps in the middle of a run, twice; a `driver.StepHook`.

    Attributes:
        report: what was found; empty until the steps were run.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.report = ""
        self._num_steps = num_steps
        self._device = device
        self._seen = 0
        self._first: int | None = None
        self._python: cProfile.Profile | None = None
        self._torch: Any = None
        self._start_s = 0.0

    def before_step(self, share_done: float) -> None:
        """See `driver.StepHook`."""
        self._seen += 1
        if self._first is None:
            if share_done < _START_SHARE and self._seen < _START_STEPS:
                return
            self._first = self._seen
            self._start_python()
        elif self._seen == self._first + self._num_steps:
            self._end_python()
            self._start_torch()
        elif self._seen == self._first + 2 * self._num_steps:
            self._end_torch()

    def close(self) -> None:
        """The run has ended: what is still being profiled is cut short."""
        if self._python is not None:
            self._end_python()
        if self._torch is not None:
            self._end_torch()
        if not self.report:
            self.report = "no step was profiled: the run was too short"

    def _start_python(self) -> None:
        self._python = cProfile.Profile()
        self._start_s = time.perf_counter()
        self._python.enable()

    def _end_python(self) -> None:
        profile, self._python = self._python, None
        assert profile is not None
        profile.disable()
        wall_s = time.perf_counter() - self._start_s
        shown = io.StringIO()
        stats = pstats.Stats(profile, stream=shown)
        stats.sort_stats("tottime").print_stats(_ROWS)
        stats.sort_stats("cumtime").print_stats("hotset", _ROWS)
        self.report += (
            f"Python, {self._num_steps} steps in {wall_s * 1e3:.1f} ms (its profiler slows it "
            f"down):\n{shown.getvalue().strip()}\n"
        )

    def _start_torch(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)
        self._torch = torch.profiler.profile(activities=activities)
        self._torch.__enter__()
        self._start_s = time.perf_counter()

    def _end_torch(self) -> None:
        profiler, self._torch = self._torch, None
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self._device)
        wall_s = time.perf_counter() - self._start_s
        profiler.__exit__(None, None, None)
        averages = profiler.key_averages()
        busy_s = device_busy_s(profiler.events()) if is_cuda else _host_busy_s(averages)
        where = "the GPU was busy" if is_cuda else "operators of torch ran"
        self.report += (
            f"\ntorch, {self._num_steps} steps in {wall_s * 1e3:.1f} ms: {where} "
            f"{busy_s * 1e3:.1f} ms of it, {busy_s / wall_s:.0%}\n"
        )
        orders = {"by device time": "self_device_time_total"} if is_cuda else {}
        orders["by host time"] = "self_cpu_time_total"
        for title, order in orders.items():
            table = averages.table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
            self.report += f"\ntop {_ROWS} {title}:\n{table}\n"


def device_busy_s(events: Any) -> float:
    """Time in which at least one kernel or copy ran on the device: the union of their intervals."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA"
    )
    busy_us, end_us = 0.0, float("-inf")
    for start, end in spans:
        if end > end_us:
            busy_us += end - max(start, end_us)
            end_us = end
    return busy_us / 1e6


def _host_busy_s(averages: Any) -> float:
    return float(sum(event.self_cpu_time_total for event in averages)) / 1e6
