"""Driving the engine: its steps, in the caller's thread, and a look at the tiers now and then."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil

from hotset.bench.play import Play, Record
from hotset.bench.workload import Work
from hotset.engine.engine import Engine
from hotset.errors import EngineError
from hotset.request import FinishReason, SamplingParams

_SAMPLE_S = 0.1
_MOST_SAMPLES = 1200
_STALL_S = 300.0  # nothing ends for so long: the run is given up
_PIN_STALL_S = 15.0
_IDLE_S = 0.002


@dataclass(frozen=True, slots=True)
class Sample:
    """What lies where at one moment, and what was moved since the start of the run; bytes."""

    t_s: float
    device_held: int
    device_cached: int
    host_used: int
    disk_used: int
    to_device: int
    to_host: int
    from_disk: int
    to_disk: int
    running: int
    waiting: int
    computed_tokens: int


class StepHook(Protocol):
    """Told of each step; see `profile.StepProfiler`."""

    def before_step(self, share_done: float) -> None:
        """A step is about to run; so much of the work has ended."""
        ...


class Watch:
    """Samples of the tiers and of this process. Where a run is long they get further apart."""

    def __init__(self, engine: Engine, start_s: float) -> None:
        self.samples: list[Sample] = []
        self.peak_host_rss_bytes = 0
        self._engine = engine
        self._start_s = start_s
        self._due_s = start_s
        self._every_s = _SAMPLE_S
        self._process = psutil.Process()
        self._moved = dict(engine.metrics.moved_bytes)
        self._computed = engine.metrics.computed_tokens

    def look(self, now_s: float) -> None:
        """Take a sample if one is due."""
        if now_s >= self._due_s:
            self._due_s = now_s + self._every_s
            self.take(now_s)

    def take(self, now_s: float) -> None:
        """Take a sample."""
        engine = self._engine
        pool, tiers, metrics = engine.kv.pool, engine.tiers, engine.metrics
        block = engine.sizes.block_bytes
        used = [0]  # host memory, and the slower tiers
        if tiers is not None:
            rows = zip(tiers.infos, tiers.usage(), strict=True)
            used = [usage.used_payloads * info.payload_bytes for info, usage in rows]

        def moved(direction: str) -> int:
            return metrics.moved_bytes[direction] - self._moved.get(direction, 0)

        self.samples.append(
            Sample(
                t_s=round(now_s - self._start_s, 3),
                device_held=pool.num_held * block,
                device_cached=pool.num_cached * block,
                host_used=used[0],
                disk_used=sum(used[1:]),
                to_device=moved("host>device"),
                to_host=moved("device>host"),
                from_disk=moved("disk>host"),
                to_disk=moved("host>disk"),
                running=len(engine.scheduler.running),
                waiting=len(engine.scheduler.waiting),
                computed_tokens=metrics.computed_tokens - self._computed,
            )
        )
        self.peak_host_rss_bytes = max(self.peak_host_rss_bytes, self._process.memory_info().rss)
        if len(self.samples) > _MOST_SAMPLES:
            del self.samples[1::2]
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
    """Play `work` on the engine, to its end or for `max_s` seconds; past end tokens.

    Raises:
        EngineError: nothing came for five minutes.
        RuntimeError: the device failed.
    """
    play = Play(work)
    records: dict[str, Record] = {}
    start_s = time.perf_counter()
    watch = Watch(engine, start_s)
    ended_s = start_s
    num_requests = work.num_requests
    is_complete = True
    while not play.is_over:
        now_s = time.perf_counter()
        elapsed_s = now_s - start_s
        if max_s is not None and elapsed_s > max_s:
            is_complete = False
            break
        while (due := play.take_due(elapsed_s)) is not None:
            params = SamplingParams(
                max_tokens=due.output_tokens,
                temperature=work.temperature,
                seed=due.seed,
                ignore_eos=True,
            )
            records[engine.add_request(due.prompt, params)] = due.record
        watch.look(now_s)
        progress(play, elapsed_s)
        if not engine.has_work:
            if engine.has_transfers:
                engine.kv.poll()
            if (arrival_s := play.next_arrival_s()) is not None:
                time.sleep(min(_IDLE_S, max(0.0, arrival_s - elapsed_s)))
            ended_s = now_s
            continue
        if hook is not None:
            hook.before_step(play.num_ended / num_requests)
        outputs = engine.step()
        now_s = time.perf_counter()
        elapsed_s = now_s - start_s
        for output in outputs:
            ended_s = now_s
            record = records[output.request_id]
            if output.token_ids:
                play.on_tokens(record, output.token_ids, elapsed_s)
            if output.finish_reason is not None:
                failed = output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
                reason = (output.error or output.finish_reason.value) if failed else None
                play.on_end(record, elapsed_s, reason)
                del records[output.request_id]
        if now_s - ended_s > _STALL_S:
            raise EngineError(
                f"no token came for {_STALL_S:.0f} s with {play.num_open} requests open; "
                f"{len(engine.scheduler.running)} run, {len(engine.scheduler.waiting)} wait"
            )
    wall_s = time.perf_counter() - start_s
    watch.take(time.perf_counter())
    for request_id in records:
        engine.abort(request_id)
    settle(engine)
    return Driven(play, wall_s, is_complete, watch)


def settle(engine: Engine, *, timeout_s: float = 30.0) -> None:
    """Let what was aborted or is still being copied end, for a bounded time."""
    deadline_s = time.perf_counter() + timeout_s
    while engine.has_work and time.perf_counter() < deadline_s:
        engine.step()
    while engine.has_transfers and time.perf_counter() < deadline_s:
        engine.kv.poll()
        if engine.tiers is not None:
            engine.tiers.flush()
            engine.tiers.wait(0.01)


def wait_for_host_tier(engine: Engine) -> float:
    """Wait until all host memory of the tier can be used; returns the seconds.

    It is pinned beside the start. Where that stops short, the engine has logged why.
    """
    start_s = grown_s = time.perf_counter()
    tiers = engine.tiers
    num_slots = 0
    while tiers is not None and tiers.host.num_slots < engine.sizes.host_slots:
        engine.kv.poll()
        if tiers.host.num_slots > num_slots:
            num_slots, grown_s = tiers.host.num_slots, time.perf_counter()
        elif time.perf_counter() - grown_s > _PIN_STALL_S:
            break
        time.sleep(0.01)
    return time.perf_counter() - start_s
