"""Decode steps in a steady state: as many requests run as will, and none of them has a prompt left.

What a run from first to last request would take an hour to show at long contexts.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hotset.bench.result import ArmRun
from hotset.bench.workload import Work
from hotset.cost.hot_plan import plan_hot_set
from hotset.cost.hot_set import HotSetCost, HotStep, Room, SparseCache
from hotset.cost.selection import DrawnSelections, Guesses
from hotset.cost.step_time import CostModel
from hotset.engine.engine import Engine
from hotset.engine.run import settle
from hotset.engine.status import engine_usage
from hotset.errors import EngineError
from hotset.metrics import HOT_ROWS, HotCounts, Metrics
from hotset.request import SamplingParams

_STILL_STEPS = 24  # in a row without a change: what was asked of tiers has come by then
_SETTLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Steady:
    """What decode steps did, with what a plan says of them.

    Attributes:
        offered: requests that run or wait.
        users: tokens per step.
        hot_users: requests that are hot at the end.
        context: mean tokens of a request that runs, at the end.
        wall_s: of all steps together.
        step_s: p50 and p90 of single ones.
        misses: rows per hot request, selecting layer and step; None where none is hot.
        hit_rate: share of what hot requests selected that slots held; likewise None.
        guessed: likewise of `misses`, rows that came ahead as they were guessed.
        guessed_right: of these, selected then.
        link_bytes_per_s: of their rows, over all of the time.
        preemptions: from the first request on.
        fill_s: from the first request to the steady state.
        planned: see `planned_step`; None where nothing is known of the hardware.
    """

    offered: int
    users: float
    hot_users: int
    context: float
    steps: int
    wall_s: float
    step_s: dict[str, float]
    misses: float | None
    hit_rate: float | None
    link_bytes_per_s: float
    preemptions: int
    fill_s: float
    guessed: float | None = None
    guessed_right: float | None = None
    planned: dict[str, Any] | None = None

    @property
    def output_tokens_per_s(self) -> float:
        """Of all users."""
        return self.users * self.steps / self.wall_s

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"output_tokens_per_s": self.output_tokens_per_s}

    def lines(self, name: str) -> list[str]:
        """Measured, and below it planned."""
        found = _line(
            name,
            tokens_per_s=self.output_tokens_per_s,
            users=self.users,
            hot=self.hot_users,
            step_s=self.wall_s / self.steps,
            misses=self.misses,
            guessed=self.guessed,
            guessed_right=self.guessed_right,
            link=self.link_bytes_per_s,
        )
        more = f"  ({self.preemptions} preemptions, {self.fill_s:.1f} s to fill)"
        if (planned := self.planned) is None:
            return [found + more]
        return [found + more, _line("  planned", **planned)]


def _line(
    name: str,
    *,
    tokens_per_s: float,
    users: float,
    hot: int,
    step_s: float,
    misses: float | None,
    link: float,
    guessed: float | None,
    guessed_right: float | None,
    no_link_tokens_per_s: float | None = None,
) -> str:
    rows = ""
    if misses is not None:
        ahead = f"{guessed:,.0f} guessed, {guessed_right:,.0f} right, " if guessed else ""
        rows = f"; {misses:,.0f} misses, {ahead}{link / 1e9:.1f} GB/s"
    if no_link_tokens_per_s is not None:
        rows += f"; {no_link_tokens_per_s:,.1f} tokens/s if rows took no time"
    return (
        f"{name}: {tokens_per_s:,.1f} tokens/s; {users:.1f} users, {hot} hot; "
        f"{step_s * 1e3:.2f} ms{rows}"
    )


class SteadyRun:
    """Offers the first turn of sessions, waits for the steady state, and times steps.

    Args:
        engine: that does nothing else.
        work: its answers are long enough that none ends meanwhile.
        progress: is called once per step, and calls what it is given if it wants the text now.
    """

    def __init__(
        self, engine: Engine, work: Work, progress: Callable[[Callable[[], str]], None]
    ) -> None:
        self._engine, self._work, self._progress = engine, work, progress
        self.outputs: dict[int, list[int]] = {}
        self._sessions: dict[str, int] = {}

    def measure(self, offered: int, num_steps: int, *, most_fill_s: float | None = None) -> Steady:
        """Figures of `num_steps` steps; afterwards nothing runs.

        Args:
            offered: requests, of the first sessions.
            num_steps: that are timed.
            most_fill_s: after so long the steps are timed, steady or not; None waits.

        Raises:
            EngineError: a request ended, or all that was offered never runs.
        """
        engine, metrics = self._engine, self._engine.metrics
        start_s, preemptions = time.perf_counter(), metrics.preemptions
        self.outputs = {number: [] for number in range(offered)}
        for number in range(offered):
            turn = self._work.sessions[number].turns[0]
            params = SamplingParams(
                max_tokens=turn.output_tokens,
                temperature=self._work.temperature,
                seed=self._work.sampling_seed(number, 0),
                ignore_eos=True,
            )
            self._sessions[engine.add_request(turn.make_tokens(), params)] = number
        for _ in self._fill(most_fill_s):
            self._step()
        engine.take_counts()
        first_s = time.perf_counter()
        fill_s = first_s - start_s
        tokens, before = metrics.output_tokens, _counts(metrics)
        ends = [first_s]
        for _ in range(num_steps):
            self._step()
            ends.append(time.perf_counter())
        engine.take_counts()
        wall_s = time.perf_counter() - first_s
        counts = HotCounts(*(n - m for n, m in zip(_counts(metrics), before, strict=True)))
        selected = counts.hits + counts.misses
        hot_users = 0 if engine.kv.hot is None else engine.kv.hot.num_hot
        selections = hot_users * num_steps * _selecting_layers(engine)
        running = engine.scheduler.running
        step_s = np.percentile(np.diff(ends), (50, 90))
        found = Steady(
            offered=offered,
            users=(metrics.output_tokens - tokens) / num_steps,
            hot_users=hot_users,
            context=sum(one.num_tokens for one in running) / len(running),
            steps=num_steps,
            wall_s=wall_s,
            step_s={"p50": float(step_s[0]), "p90": float(step_s[1])},
            misses=counts.misses / selections if selected else None,
            hit_rate=counts.hits / selected if selected else None,
            guessed=counts.guessed / selections if selected else None,
            guessed_right=counts.guessed_right / selections if selected else None,
            link_bytes_per_s=counts.moved_bytes / wall_s,
            preemptions=metrics.preemptions - preemptions,
            fill_s=fill_s,
        )
        self._end()
        return found

    def _fill(self, most_s: float | None) -> Iterator[None]:
        """One for each step until there was no change for a while."""
        engine, start_s = self._engine, time.perf_counter()
        seen, num_still = None, 0
        while num_still < _STILL_STEPS:
            yield
            running = engine.scheduler.running
            is_filling = any(one.num_uncomputed_tokens > 1 for one in running)
            now = None if is_filling else (len(running), engine.metrics.turned_hot)
            num_still = num_still + 1 if now is not None and now == seen else 0
            seen = now
            if most_s is not None and time.perf_counter() - start_s > most_s:
                return

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finish_reason is not None:
                raise EngineError(
                    f"a request ended before the steady state was measured "
                    f"({output.error or output.finish_reason.value}); give more output_tokens"
                )
            self.outputs[self._sessions[output.request_id]] += output.token_ids
        self._progress(self._state)

    def _state(self) -> str:
        usage = engine_usage(self._engine)
        return (
            f"{usage.num_running} running, {usage.num_waiting} waiting, "
            f"{self._engine.metrics.turned_hot} turned hot"
        )

    def _end(self) -> None:
        for request_id in self._sessions:
            self._engine.abort(request_id)
        self._sessions.clear()
        settle(self._engine, _SETTLE_S)


def steady_run(arm: str, repeat: int, found: list[Steady], outputs: dict[int, list[int]]) -> ArmRun:
    """The run of an arm, whose own figures are those of the first of `found`."""
    first = found[0]
    return ArmRun(
        arm=arm,
        repeat=repeat,
        is_complete=True,
        wall_s=first.wall_s,
        requests=first.offered,
        failed=0,
        first_error=None,
        prompt_tokens=0,
        output_tokens=round(first.users * first.steps),
        latencies={"itl_s": {"mean": first.wall_s / first.steps, **first.step_s}},
        ttft_by_turn_s=[],
        tpot_by_turn_s=[],
        engine={
            "steps": first.steps,
            "mean_step_ms": first.wall_s / first.steps * 1e3,
            "preemptions": first.preemptions,
        },
        steady=[one.as_dict() for one in found],
        outputs={(session, 0): tokens for session, tokens in outputs.items() if tokens},
    )


def _counts(metrics: Metrics) -> HotCounts:
    """What hot requests found and fetched so far."""
    return HotCounts(
        metrics.hot_hits,
        metrics.hot_misses,
        metrics.hot_guessed,
        metrics.hot_guessed_right,
        metrics.moved_bytes[HOT_ROWS],
    )


def _selecting_layers(engine: Engine) -> int:
    hot = engine.sizes.hot
    return 0 if hot is None else hot.sparse.index_layers


def planned_step(
    cost: CostModel, engine: Engine, steady: Steady, overlap: float, guessed: float
) -> dict[str, Any] | None:
    """What the planner says of the engine's memory and the load: arguments of a line.

    None where the model attends to all tokens, or the planner lets no request run.
    """
    cache, sizes = SparseCache.of(cost.shape, cost.kv_dtype), engine.sizes
    if cache is None:
        return None
    block_bytes = float(sizes.block_bytes)
    room = Room(sizes.device_blocks * block_bytes, sizes.host_slots * block_bytes)
    hot = HotSetCost(
        cost,
        cache,
        DrawnSelections(overlap),
        steady.context,
        prefetch=engine.options.memory.row_prefetch,
        right=guessed,
    )
    step: HotStep | None = hot.resident_step(steady.offered, room)
    rows: Guesses | None = None
    if sizes.hot is not None:
        slots = sizes.hot.num_slots
        plan = plan_hot_set(hot, room, steady.offered, slots=slots)
        if plan is not None and plan.hot.num_hot:
            step, rows = plan.hot, plan.rows
    if step is None:
        return None
    return {
        "tokens_per_s": step.tokens_per_s,
        "users": step.users,
        "hot": step.num_hot,
        "step_s": step.seconds,
        "misses": rows and rows.missed,
        "guessed": rows and rows.guessed,
        "guessed_right": rows and rows.right,
        "link": step.missed_bytes / step.seconds,
        "no_link_tokens_per_s": step.users / step.chip_s if step.num_hot else None,
    }
