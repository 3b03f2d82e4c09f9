"""Where the seconds between the command and the first request go."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_LEAST_S = 0.05  # a shorter phase is no line


@dataclass(slots=True)
class Phase:
    """One part of a start.

    Attributes:
        name: what is done.
        seconds: how long it took.
        detail: what to say beside it.
    """

    name: str
    seconds: float
    detail: str = ""


class StartTimes:
    """Takes down the phases of a start, and shows the one that runs on a terminal.

    Args:
        num_phases: how many `phase` will be called for, for the bar; a guess is enough.
        shows: whether to show a bar on stderr, where that is a terminal.
    """

    def __init__(self, *, num_phases: int = 0, shows: bool = False) -> None:
        self._phases: list[Phase] = []
        self._start_s = time.perf_counter()
        self._bar: Progress | None = None
        if shows and sys.stderr.isatty():
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=num_phases)
            self._bar.start()

    @classmethod
    def of_process(cls, *, num_phases: int) -> "StartTimes":
        """Those of a process that has just imported what it needs, which is the first phase."""
        times = cls(num_phases=num_phases, shows=True)
        passed_s = max(0.0, time.time() - psutil.Process().create_time())
        times._start_s -= passed_s
        times._phases.append(Phase("Python and imports", passed_s))
        return times

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time what is done within; `detail` may be set there."""
        phase = Phase(name, 0.0)
        if self._bar is not None:
            self._bar.update(self._task, description=name)
        start_s = time.perf_counter()
        try:
            yield phase
        finally:
            phase.seconds = time.perf_counter() - start_s
            self._phases.append(phase)
            if self._bar is not None:
                self._bar.advance(self._task)

    def close(self) -> None:
        """Take the bar off the terminal. Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def report(self) -> str:
        """A line for each phase that took a while, and one for what lies between them."""
        total_s = time.perf_counter() - self._start_s
        other_s = total_s - sum(phase.seconds for phase in self._phases)
        lines = [f"start: {total_s:.1f} s"]
        for phase in [*self._phases, Phase("other", other_s)]:
            if phase.seconds < _LEAST_S:
                continue
            detail = f"  {phase.detail}" if phase.detail else ""
            lines.append(f"  {phase.name:<28}{phase.seconds:>6.1f} s{detail}")
        return "\n".join(lines)
