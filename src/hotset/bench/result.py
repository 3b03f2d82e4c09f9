"""From what was observed to figures: plain data for the table, the page and JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

from hotset.bench.play import Play, Record


@dataclass(slots=True)
class ArmRun:
    """One run of one arm.

    Times in seconds, rates in tokens a second. A total counts every prompt token in full, reused
    or not. What a server does not tell is None.

    Attributes:
        arm: one of `arms.ARMS`, or the address of a server.
        repeat: number of the round, from 0.
        is_complete: whether all requests were sent and ended well.
        latencies: `ttft_s`, `tpot_s`, `itl_s`, `e2e_s` -> mean, p50, p90, p99.
        ttft_by_turn_s: mean of each turn.
        engine: counters of the engine over the run, see `metrics.Metrics`, with what follows
            from them.
        sizes: bytes and tokens of the tiers, and rates measured as the engine started.
        prediction: of the cost model, see `predict`.
        samples: see `driver.Watch`.
        steady: figures of a steady state for each number of users, see `steady.Steady`; the run's
            own are of the first.
        outputs: tokens of each answer by (session, turn); only for comparing arms.
        records: of text, by session and turn; only for showing answers.
    """

    arm: str
    repeat: int
    is_complete: bool
    wall_s: float
    requests: int
    failed: int
    first_error: str | None
    prompt_tokens: int
    output_tokens: int
    latencies: dict[str, dict[str, float]]
    ttft_by_turn_s: list[float]
    tpot_by_turn_s: list[float]
    start_s: float | None = None
    tiers_ready_s: float | None = None
    warm_up_s: float | None = None
    prepare_s: float | None = None
    peak_host_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    prediction: dict[str, Any] | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    budget_report: str = ""
    steady: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[tuple[int, int], list[int]] = field(default_factory=dict, repr=False)
    records: list[Record] = field(default_factory=list, repr=False)

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens, reused or not."""
        return (self.prompt_tokens + self.output_tokens) / self.wall_s

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens of all users."""
        return self.output_tokens / self.wall_s

    def count(self, name: str) -> int | None:
        """A counter of the engine; None where there is none."""
        value = self.engine.get(name)
        return None if value is None else int(value)

    def latency(self, name: str, figure: str) -> float | None:
        """One figure of `latencies`."""
        return self.latencies.get(name, {}).get(figure)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        kept = [f.name for f in fields(self) if f.name not in ("outputs", "records")]
        return {name: getattr(self, name) for name in kept} | {
            "total_tokens_per_s": self.total_tokens_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
        }


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; empty where there are no values."""
    if not values:
        return {}
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return {
        "mean": fmean(ordered),
        "p50": percentile(0.50),
        "p90": percentile(0.90),
        "p99": percentile(0.99),
    }


def observe(arm: str, repeat: int, play: Play, wall_s: float, *, is_complete: bool) -> ArmRun:
    """The figures that a client sees."""
    done = [record for record in play.records if record.is_complete]
    ttft = [(record.turn, record.first_s - record.sent_s) for record in done if record.first_s]
    tpot = [
        (record.turn, (record.last_s - record.first_s) / (record.num_tokens - 1))
        for record in done
        if record.first_s is not None and record.num_tokens > 1
    ]
    errors = [record.error for record in play.records if record.error is not None]
    return ArmRun(
        arm=arm,
        repeat=repeat,
        is_complete=is_complete and not errors,
        wall_s=wall_s,
        requests=len(done),
        failed=len(errors),
        first_error=errors[0] if errors else None,
        prompt_tokens=play.prompt_tokens,
        output_tokens=play.output_tokens,
        latencies={
            "ttft_s": summarise([value for _, value in ttft]),
            "tpot_s": summarise([value for _, value in tpot]),
            "itl_s": summarise(play.gaps_s),
            "e2e_s": summarise([r.end_s - r.sent_s for r in done if r.end_s is not None]),
        },
        ttft_by_turn_s=_means_by_turn(ttft),
        tpot_by_turn_s=_means_by_turn(tpot),
        outputs={(r.session, r.turn): r.token_ids.tolist() for r in done},
        records=sorted(done, key=lambda r: (r.session, r.turn)) if play.work.is_text else [],
    )


def _means_by_turn(values: Iterable[tuple[int, float]]) -> list[float]:
    by_turn: dict[int, list[float]] = {}
    for turn, value in values:
        by_turn.setdefault(turn, []).append(value)
    return [fmean(by_turn[turn]) for turn in sorted(by_turn)]


@dataclass(slots=True)
class Failure:
    """A run that could not be made or broke off, and why."""

    arm: str
    repeat: int
    reason: str


@dataclass(slots=True)
class BenchResult:
    """All runs of one call.

    Attributes:
        asked: what was run: workload, model, options.
        machine: see `machine.describe_machine`.
        is_open_loop: whether requests came by the clock: then the wall time says nothing, and
            arms are compared by the mean time from sending a request to its end.
        verification: see `verify`; None where it was not asked for.
    """

    title: str
    asked: dict[str, Any]
    machine: dict[str, Any]
    is_open_loop: bool = False
    runs: list[ArmRun] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    verification: dict[str, Any] | None = None
    verdict: str = ""

    @property
    def arms(self) -> list[str]:
        """Names in the order of their first runs."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    def time_s(self, run: ArmRun) -> float:
        """What arms are compared by: wall time, or in an open loop the mean time of a request.

        In a steady state it is the wall time per token.
        """
        if run.steady:
            return run.wall_s / run.output_tokens
        if not self.is_open_loop:
            return run.wall_s
        return run.latency("e2e_s", "mean") or run.wall_s

    def times_s(self, arm: str) -> list[float]:
        """`time_s` of an arm's runs."""
        return [self.time_s(run) for run in self.runs if run.arm == arm]

    def typical(self, arm: str) -> ArmRun:
        """The run of median time (the faster of two in the middle)."""
        runs = sorted((run for run in self.runs if run.arm == arm), key=self.time_s)
        good = [run for run in runs if run.is_complete] or runs
        return good[(len(good) - 1) // 2]

    @property
    def baseline(self) -> str | None:
        """The arm that others are compared with: without slower tiers, or without any offload."""
        return next((arm for arm in ("hot", "resident") if arm in self.arms), None)

    def ratio(self, arm: str, to: str | None = None) -> float | None:
        """How many times as fast `arm` is as `to`, by typical runs; None where one is missing.

        Args:
            arm: the one that is compared.
            to: what it is compared with; None is `baseline`.
        """
        to = to or self.baseline
        if to is None or not {to, arm} <= set(self.arms):
            return None
        return self.time_s(self.typical(to)) / self.time_s(self.typical(arm))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": self.title,
            "verdict": self.verdict,
            "asked": self.asked,
            "machine": self.machine,
            "is_open_loop": self.is_open_loop,
            "verification": self.verification,
            "baseline": self.baseline,
            "ratios": {arm: self.ratio(arm) for arm in self.arms},
            "runs": [run.as_dict() for run in self.runs],
            "failures": [asdict(failure) for failure in self.failures],
        }


def verify(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """Compare the answers of all runs with those of the first, token by token.

    A request whose session differed before is not compared: it was asked something else.
    """
    first, *others = runs
    found: dict[str, Any] = {"reference": first.arm, "runs": []}
    for run in others:
        compared = num_differing = num_after = 0
        first_difference: dict[str, Any] | None = None
        parted: set[int] = set()
        for key in sorted(first.outputs.keys() & run.outputs.keys()):
            session, turn = key
            if session in parted:
                num_after += 1
                continue
            compared += 1
            one, other = first.outputs[key], run.outputs[key]
            if run.steady:  # broken off, each after its own number of tokens
                shortest = min(len(one), len(other))
                one, other = one[:shortest], other[:shortest]
            if one != other:
                num_differing += 1
                parted.add(session)
                at = next(
                    (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                    min(len(one), len(other)),
                )
                first_difference = first_difference or {
                    "session": session,
                    "turn": turn,
                    "token": at,
                }
        found["runs"].append(
            {
                "arm": run.arm,
                "repeat": run.repeat,
                "compared": compared,
                "differing": num_differing,
                "not_compared": num_after,
                "first_difference": first_difference,
            }
        )
    found["differing"] = sum(run["differing"] for run in found["runs"])
    return found
