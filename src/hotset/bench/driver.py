"""Driving the engine: its steps, in the caller's thread, and a look at the tiers now and then."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil

from hotset.bench.play import Due, Play, Record
from hotset.bench.workload import Work
from hotset.engine.engine import Engine
from hotset.engine.run import run_steps, settle
from hotset.engine.status import engine_usage
from hotset.errors import EngineError
from hotset.request import FinishReason, RequestOutput, SamplingParams

_SAMPLE_S = 0.1
_MOST_SAMPLES = 1200
_STALL_S = 300.0  # nothing ends for so long: the run is given up
_PIN_STALL_S = 15.0
_IDLE_S = 0.002
_SETTLE_S = 30.0


class StepHook(Protocol):
    """Told of each step; see `profiler.StepProfiler`."""

    def before_step(self, share_done: float) -> None:
        """A step is about to run; `share_done` of the requests, 0 to 1, have ended."""
        ...


class Watch:
    """Samples of the tiers and of this process. Where a run is long they get further apart.

    Attributes:
        samples: one list per figure: `t_s`, bytes that lie somewhere, bytes and tokens that were
            moved and computed since the start, and numbers of requests.
    """

    def __init__(self, engine: Engine, start_s: float) -> None:
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        self.peak_host_rss_bytes = 0
        self._engine = engine
        self._start_s = start_s
        self._due_s = start_s
        self._every_s = _SAMPLE_S
        self._process = psutil.Process()
        self._moved = engine.metrics.moved_bytes.copy()
        self._computed = engine.metrics.computed_tokens

    def look(self, now_s: float) -> None:
        """Take a sample if one is due."""
        if now_s >= self._due_s:
            self._due_s = now_s + self._every_s
            self.take(now_s)

    def take(self, now_s: float) -> None:
        """Take a sample."""
        usage, metrics = engine_usage(self._engine), self._engine.metrics
        used = [tier.used_payloads * info.payload_bytes for info, tier in usage.tiers]
        moved = metrics.moved_bytes - self._moved
        sample = {
            "t_s": round(now_s - self._start_s, 3),
            "device_held": usage.device_held,
            "device_cached": usage.device_cached,
            "host_used": sum(used[:1]),
            "disk_used": sum(used[1:]),
            "to_device": moved["host>device"],
            "to_host": moved["device>host"],
            "from_disk": moved["disk>host"],
            "to_disk": moved["host>disk"],
            "running": usage.num_running,
            "waiting": usage.num_waiting,
            "computed_tokens": metrics.computed_tokens - self._computed,
        }
        for name, value in sample.items():
            self.samples[name].append(value)
        self.peak_host_rss_bytes = max(self.peak_host_rss_bytes, self._process.memory_info().rss)
        if len(self.samples["t_s"]) > _MOST_SAMPLES:
            for values in self.samples.values():
                del values[1::2]
            self._every_s *= 2


@dataclass(slots=True)
class Driven:
    """A run of the engine that has ended.

    Attributes:
        is_complete: whether every request was sent and ended within the time given.
    """

    play: Play
    wall_s: float
    is_complete: bool
    watch: Watch


def drive(
    engine: Engine,
    work: Work,
    *,
    max_s: float | None = None,
    progress: Callable[[Play, float], None] = lambda play, now_s: None,
    hook: StepHook | None = None,
) -> Driven:
    """Play `work` on the engine, to its end or for `max_s` seconds.

    Raises:
        EngineError: nothing came for five minutes.
        RuntimeError: the device failed.
    """
    driver = _Driver(engine, work, max_s, progress, hook)
    for outputs in run_steps(engine, driver.feed):
        driver.take(outputs)
    return driver.end()


class _Driver:
    """Sends what is due before a step, and notes what the step put out."""

    def __init__(
        self,
        engine: Engine,
        work: Work,
        max_s: float | None,
        progress: Callable[[Play, float], None],
        hook: StepHook | None,
    ) -> None:
        self._engine, self._work, self._max_s = engine, work, max_s
        self._progress, self._hook = progress, hook
        self._play = Play(work)
        self._records: dict[str, Record] = {}
        self._num_requests = work.num_requests
        self._is_complete = True
        self._start_s = self._ended_s = time.perf_counter()
        self._watch = Watch(engine, self._start_s)

    def feed(self) -> int | None:
        """See `run_steps`."""
        play, engine = self._play, self._engine
        now_s = time.perf_counter()
        elapsed_s = now_s - self._start_s
        if play.is_over:
            return None
        if self._max_s is not None and elapsed_s > self._max_s:
            self._is_complete = False
            return None
        while (due := play.take_due(elapsed_s)) is not None:
            self._records[engine.add_request(due.prompt, self._params(due))] = due.record
        self._watch.look(now_s)
        self._progress(play, elapsed_s)
        if not engine.has_work:
            if (arrival_s := play.next_arrival_s()) is not None:
                time.sleep(min(_IDLE_S, max(0.0, arrival_s - elapsed_s)))
            self._ended_s = now_s
        elif self._hook is not None:
            self._hook.before_step(play.num_ended / self._num_requests)
        return 0

    def _params(self, due: Due) -> SamplingParams:
        """Text ends where the model ends it; random tokens go on past end tokens."""
        return SamplingParams(
            max_tokens=due.output_tokens,
            temperature=self._work.temperature,
            seed=due.seed,
            ignore_eos=not self._work.is_text,
            logprobs=2 if self._work.is_text else None,
        )

    def take(self, outputs: list[RequestOutput]) -> None:
        """Note what a step put out."""
        now_s = time.perf_counter()
        elapsed_s = now_s - self._start_s
        for output in outputs:
            self._ended_s = now_s
            record = self._records[output.request_id]
            if record.said is not None:
                record.said.take(output)
            if output.token_ids:
                self._play.on_tokens(record, output.token_ids, elapsed_s)
            if output.finish_reason is not None:
                failed = output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
                reason = (output.error or output.finish_reason.value) if failed else None
                self._play.on_end(record, elapsed_s, reason)
                del self._records[output.request_id]
        if now_s - self._ended_s > _STALL_S:
            usage = engine_usage(self._engine)
            raise EngineError(
                f"no token came for {_STALL_S:.0f} s with {self._play.num_open} requests open; "
                f"{usage.num_running} run, {usage.num_waiting} wait"
            )

    def end(self) -> Driven:
        """Drop what is still open, and let copies end."""
        now_s = time.perf_counter()
        self._watch.take(now_s)
        for request_id in self._records:
            self._engine.abort(request_id)
        settle(self._engine, _SETTLE_S)
        return Driven(self._play, now_s - self._start_s, self._is_complete, self._watch)


def wait_for_host_tier(engine: Engine) -> float:
    """Wait until all host memory of the tier can be used; returns the seconds.

    It is pinned beside the start. Where that stops short, the engine has logged why.
    """
    start_s = grown_s = time.perf_counter()
    num_ready = 0
    while tiers := engine_usage(engine).tiers:
        info, usage = tiers[0]
        now_s = time.perf_counter()
        if usage.capacity_payloads > num_ready:
            num_ready, grown_s = usage.capacity_payloads, now_s
        if num_ready >= info.capacity_payloads or now_s - grown_s > _PIN_STALL_S:
            break
        time.sleep(0.01)
        engine.step()  # takes note of memory that is ready
    return time.perf_counter() - start_s
