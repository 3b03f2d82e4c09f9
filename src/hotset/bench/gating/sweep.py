"""Growing batches for several ways of doing the same, until each does not fit any more."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from hotset.units import GIB

# The next batch is twice as large, and a dispatch mask grows with the square of the batch.
_GROWTH = 4.0


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        name: in tables.
        run: is called with what `prepare` gave for a batch.
        capacity: factor f of static gating; None for a way that drops nothing.
        least_bytes: for a batch, memory it cannot do without: a CPU need not try what has none.
        dropped: for what `prepare` gave, share of the routed rows that are not computed; None
            where that is not measured.
    """

    name: str
    run: Callable[..., torch.Tensor]
    capacity: float | None = None
    least_bytes: Callable[[int], int] = lambda tokens: 0
    dropped: Callable[..., float] | None = None


@dataclass(frozen=True)
class Limits:
    """What ends a sweep.

    Attributes:
        batches: tokens of each batch tried, ascending.
        memory_bytes: of a call beside the weights; infinite on a GPU, where the device ends it.
        deadline_s: on the clock of `time.monotonic`; what would end later is not begun.
        repeats: timed calls of each batch, after one that is not.
    """

    batches: Sequence[int]
    memory_bytes: float = math.inf
    deadline_s: float = math.inf
    repeats: int = 5


@dataclass(frozen=True)
class Point:
    """What one batch took.

    Attributes:
        tokens: S, the batch.
        seconds: of each repeat.
        peak_bytes: most memory in use during a call, beyond what was in use before it.
        dropped: share of the routed rows that were not computed; None where not measured.
    """

    tokens: int
    seconds: tuple[float, ...]
    peak_bytes: int
    dropped: float | None

    @property
    def tokens_per_s(self) -> float:
        """By the median repeat."""
        return self.tokens / float(np.median(self.seconds))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "peak_bytes": self.peak_bytes,
            "dropped": None if self.dropped is None else round(self.dropped, 4),
            **percentiles_ms(self.seconds),
        }


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """The least, p50, p90 and the most."""
    return {f"p{p}_ms": round(float(np.percentile(seconds, p)) * 1e3, 4) for p in (0, 50, 90, 100)}


@dataclass
class Sweep:
    """One way over growing batches, and why it stopped."""

    way: Way
    points: list[Point] = field(default_factory=list)
    stopped_by: str = ""

    @property
    def best(self) -> Point | None:
        """The batch with the highest throughput; None if none fitted."""
        return max(self.points, key=lambda point: point.tokens_per_s, default=None)

    def at(self, tokens: int) -> Point | None:
        """The point of one batch."""
        return next((point for point in self.points if point.tokens == tokens), None)


def sweep(
    ways: Sequence[Way], prepare: Callable[[int], tuple[Any, ...]], limits: Limits
) -> list[Sweep]:
    """Run `ways` over growing batches; they take turns at each, so that all find it alike."""
    sweeps = [Sweep(way) for way in ways]
    for tokens in limits.batches:
        running = [each for each in sweeps if not each.stopped_by]
        if not running:
            break
        try:
            given = prepare(tokens)
        except torch.OutOfMemoryError:
            for each in running:
                each.stopped_by = f"{tokens} tokens and their routes do not fit into the device"
            break
        _add_points(running, tokens, given, limits)
        del given
    for each in sweeps:
        each.stopped_by = each.stopped_by or "largest batch tried"
    return sweeps


@torch.inference_mode()
def _add_points(
    running: Sequence[Sweep], tokens: int, given: tuple[Any, ...], limits: Limits
) -> None:
    peaks: list[tuple[Sweep, int]] = []
    calls_s = 0.0
    for each in running:
        least_bytes = each.way.least_bytes(tokens)
        if least_bytes > limits.memory_bytes:
            each.stopped_by = f"{tokens} need {least_bytes / GIB:.2f} GiB or more"
            continue
        last_s = min(each.points[-1].seconds) if each.points else 0.0
        needs_s = calls_s * limits.repeats + last_s * _GROWTH * (limits.repeats + 2)
        if time.monotonic() + needs_s > limits.deadline_s:
            each.stopped_by = "no time left for a larger batch"
            continue
        start_s = time.monotonic()
        try:
            peak = _peak_bytes(each.way.run, given)
        except RuntimeError as error:
            each.stopped_by = why_it_failed(tokens, error, given)
            continue
        if peak > limits.memory_bytes:
            each.stopped_by = f"{tokens} took {peak / GIB:.2f} GiB"
        else:
            peaks.append((each, peak))
            calls_s += (time.monotonic() - start_s) / 2
    seconds: dict[str, list[float]] = {each.way.name: [] for each, _ in peaks}
    for repeat in range(limits.repeats):
        if repeat and time.monotonic() > limits.deadline_s:
            break
        for each, _ in peaks:
            if each.stopped_by:
                continue
            try:
                call = partial(each.way.run, *given)
                seconds[each.way.name].append(seconds_of(call, is_cuda=given[0].is_cuda))
            except RuntimeError as error:
                each.stopped_by = why_it_failed(tokens, error, given)
    for each, peak in peaks:
        if each.stopped_by:
            continue
        dropped = 0.0 if each.way.capacity is None else None
        if each.way.dropped is not None:
            dropped = each.way.dropped(*given)
        each.points.append(Point(tokens, tuple(seconds[each.way.name]), peak, dropped))


def why_it_failed(tokens: int, error: RuntimeError, given: tuple[Any, ...]) -> str:
    """What to say of a call that ended so. Beside memory, a GPU's libraries fail for lack of it.

    Raises:
        RuntimeError: it is neither, but an error of ours.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return f"{tokens} do not fit into the device"
    if not given[0].is_cuda:
        raise error
    return f"{tokens} failed: {' '.join(str(error).split())[:100]}"


def _peak_bytes(run: Callable[..., torch.Tensor], given: tuple[Any, ...]) -> int:
    """Memory of one call beyond what is there before it."""
    if given[0].is_cuda:
        torch.cuda.empty_cache()  # what an earlier way left may be in pieces
        run(*given)  # what a first call sets up stays
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    run(*given)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run(*given)
    in_use = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak


def seconds_of(call: Callable[[], object], *, is_cuda: bool) -> float:
    """Of one call, with all that it started on the device."""
    if is_cuda:
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    call()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start_s
