"""The demos: two arms of a preset that is text, side by side, with answers that one can read.

In `hotset demo` all users ask at once about texts that need several times the hot tier: once with
the hot tier alone, once with slower tiers under it. In `hotset demo-moe` they ask a small Mixture
of Experts: once with all experts resident, once with a quarter of them. On a CPU device and host
are the same memory: what is shown would cross the link to a device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from hotset.bench.campaign import Order, run_bench
from hotset.bench.play import Record, Said
from hotset.bench.presets import PRESETS
from hotset.bench.report import aligned
from hotset.bench.result import ArmRun, BenchResult, summarise
from hotset.bench.runs import RunOptions, Say
from hotset.bench.verdict import fetched_tokens
from hotset.errors import EngineError
from hotset.options import Options

_SHOWN_DIFFERENCES = 5
# Log probabilities this near may change places with the shape of a batch: float32 sums of the
# default model differ by up to 3e-5 with it.
_ROUNDING = 1e-4


def run_demo(name: str, say: Say, *, options: Options | None = None, **spec: Any) -> BenchResult:
    """Run both arms of a preset, with some figures of its spec changed.

    Raises:
        HotsetError: the model cannot be had, a size cannot work, or a request failed.
    """
    preset = PRESETS[name]
    config = Options.of(**preset.engine) if options is None else options
    order = Order(
        spec=replace(preset.spec, **spec),
        config=config,
        dummy_weights=False,
        arms=list(preset.arms),
        repeats=1,
        options=RunOptions(verify=True),
    )

    def check(result: BenchResult) -> None:
        """Raise after the first arm that did not do all."""
        for failure in result.failures:
            raise EngineError(f"{name}, {failure.arm}: {failure.reason}")
        for run in result.runs:
            if not run.is_complete:
                raise EngineError(f"{name}, {run.arm}: {run.first_error}")

    return run_bench(order, say, check)


def said(record: Record) -> Said:
    """What was asked and answered; each record of a demo has it."""
    assert record.said is not None, "the work is no text"
    return record.said


def differing(result: BenchResult) -> list[tuple[Record, Record]]:
    """The answers that are other tokens in the second arm, with both of them."""
    one, two = result.runs
    pairs = zip(one.records, two.records, strict=True)
    return [(a, b) for a, b in pairs if a.token_ids != b.token_ids]


def context_tokens(run: ArmRun) -> int:
    """Of all users' conversations at their end."""
    last = {record.session: record for record in run.records}
    return sum(record.prompt_tokens + record.num_tokens for record in last.values())


def recomputed_tokens(run: ArmRun) -> int:
    """Of the computed tokens, all beyond once for each token with all before it."""
    # The last token of an answer is never computed.
    sequences = (said(record).prompt + record.token_ids.tolist()[:-1] for record in run.records)
    return int(run.engine["computed_tokens"]) - distinct_tokens(sequences)


def distinct_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """Tokens that must be computed once at least, where equal beginnings are shared."""
    after: dict[tuple[int, int], int] = {}  # (a beginning, the token that follows) -> beginning
    for ids in sequences:
        beginning = 0
        for token in ids:
            beginning = after.setdefault((beginning, token), len(after) + 1)
    return len(after)


def _disk_read_tokens(run: ArmRun) -> int:
    """More than was fetched where blocks that were read ahead had to leave host memory again."""
    moved: int = run.engine["moved_bytes"].get("disk>host", 0)
    return moved // int(run.sizes["kv_bytes_per_token"])


def _ttft_s(run: ArmRun, figure: str, *, first_turn: int = 0) -> float:
    times = [r.first_s - r.sent_s for r in run.records if r.first_s and r.turn >= first_turn]
    return summarise(times).get(figure, 0.0)


def tiers_as_dict(result: BenchResult) -> dict[str, Any]:
    """What `hotset demo` found, as plain data."""
    hot_only, tiered = result.runs
    work = result.asked["workload"]

    def one(run: ArmRun) -> dict[str, Any]:
        return {
            "turns": [
                {
                    "user": record.session,
                    "turn": record.turn,
                    "title": said(record).title,
                    "question": said(record).question,
                    "prompt_tokens": record.prompt_tokens,
                    "ttft_s": (record.first_s or 0.0) - record.sent_s,
                    "answer": said(record).answer,
                    **_tokens(record),
                }
                for record in run.records
            ],
            "wall_s": run.wall_s,
            "context_tokens": context_tokens(run),
            "hot_tokens": run.sizes["hot_tokens"],
            "prompt_tokens": run.prompt_tokens,
            "output_tokens": run.output_tokens,
            "computed_tokens": run.engine["computed_tokens"],
            "recomputed_tokens": recomputed_tokens(run),
            "fetched_tokens": fetched_tokens(run),
            "disk_read_tokens": _disk_read_tokens(run),
            "preemptions": run.engine["preemptions"],
            "faults": run.engine["faults"],
            "report": run.budget_report,
            "tokens_per_s": run.output_tokens_per_s,
            "ttft_s_p50": _ttft_s(run, "p50"),
            "ttft_s_p99": _ttft_s(run, "p99"),
        }

    return {
        "users": work["users"],
        "turns": work["turns"],
        "hot_only": one(hot_only),
        "tiered": one(tiered),
        "speedup": tiered.output_tokens_per_s / hot_only.output_tokens_per_s,
        "differing": [f"user {r.session + 1} turn {r.turn + 1}" for r, _ in differing(result)],
    }


def experts_as_dict(result: BenchResult) -> dict[str, Any]:
    """What `hotset demo-moe` found, as plain data."""

    def one(run: ArmRun) -> dict[str, Any]:
        return {
            "answers": [
                {"question": said(r).question, "text": said(r).answer, **_tokens(r)}
                for r in run.records
            ],
            "wall_s": run.wall_s,
            "prompt_tokens": run.prompt_tokens,
            "hits": run.engine["expert_hits"],
            "misses": run.engine["expert_misses"],
            "moved_bytes": run.engine["expert_bytes"],
            "device_bytes": run.sizes["experts_device_bytes"],
            "host_bytes": run.sizes["experts_host_bytes"],
            "report": run.budget_report,
            "output_tokens": run.output_tokens,
            "tokens_per_s": run.output_tokens_per_s,
            "hit_rate": run.engine["expert_hit_rate"],
        }

    all_here, quarter = result.runs
    return {
        "model": result.asked["model"],
        "users": result.asked["workload"]["users"],
        "num_layers": quarter.sizes["expert_layers"],
        "num_experts": quarter.sizes["experts_per_layer"],
        "num_slots": quarter.sizes["expert_slots"],
        "all_experts": one(all_here),
        "quarter": one(quarter),
        "differing": [record.session + 1 for record, _ in differing(result)],
    }


def _tokens(record: Record) -> dict[str, Any]:
    return {"token_ids": record.token_ids.tolist(), "is_complete": said(record).has_stopped}


Row = tuple[str, Callable[[ArmRun], float], int]

_TIER_ROWS: list[Row] = [
    ("output tokens/s", lambda run: run.output_tokens_per_s, 1),
    ("time to first token, p50, s", lambda run: _ttft_s(run, "p50"), 2),
    ("time to first token, p99, s", lambda run: _ttft_s(run, "p99"), 2),
    ("  p50 after the first turn, s", lambda run: _ttft_s(run, "p50", first_turn=1), 2),
    ("all answered after, s", lambda run: run.wall_s, 1),
    ("prompt tokens sent", lambda run: run.prompt_tokens, 0),
    ("output tokens", lambda run: run.output_tokens, 0),
    ("tokens computed", lambda run: run.engine["computed_tokens"], 0),
    ("  of these recomputed", recomputed_tokens, 0),
    ("tokens fetched", fetched_tokens, 0),
    ("tokens read from disk", _disk_read_tokens, 0),
    ("preemptions", lambda run: run.engine["preemptions"], 0),
]


def tiers_as_text(result: BenchResult) -> str:
    """What `hotset demo` prints."""
    one, two = result.runs
    work, context, hot = result.asked["workload"], context_tokens(two), two.sizes["hot_tokens"]
    title = (
        f"{work['users']} users, {work['turns']} turns each: contexts of {context:,} tokens, "
        f"{context / hot:.1f} times the hot tier of {hot:,}"
    )
    headings = ("hot tier alone", "with tiers")
    lines = [("", [*headings, "ratio"])]
    for label, figure, digits in _TIER_ROWS:
        first, second = figure(one), figure(two)
        if first or second or not label.startswith("  p50"):  # of one turn there is none later
            ratio = f"{second / first:.2f}" if first else ""
            lines.append((label, [f"{first:,.{digits}f}", f"{second:,.{digits}f}", ratio]))
    faults = [
        f"faults {heading} (each cost a recompute, no token): "
        + ", ".join(f"{count} {kind}" for kind, count in run.engine["faults"].items())
        for heading, run in zip(headings, result.runs, strict=True)
        if run.engine["faults"]
    ]
    return "\n".join([_answers(two), "", title, aligned(lines), *faults, _tier_verdict(result)])


def _tier_verdict(result: BenchResult) -> str:
    pairs, num_answers = differing(result), len(result.runs[0].records)
    if not pairs:
        return f"Tokens: identical in all {num_answers} answers of the two passes."
    lines = [f"Tokens: DIFFERENT in {len(pairs)} of {num_answers} answers:"]
    for one, other in pairs[:_SHOWN_DIFFERENCES]:
        lines.append(f"  user {one.session + 1} turn {one.turn + 1}: {why(one, other)}")
    if len(pairs) > _SHOWN_DIFFERENCES:
        lines.append(f"  and {len(pairs) - _SHOWN_DIFFERENCES} more")
    return "\n".join(lines)


def why(one: Record, other: Record) -> str:
    """Where two answers part, and how sure the model was of the token there."""
    if said(one).prompt != said(other).prompt:
        return "it follows another answer that differs"
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return "one answer is longer"
    gap = max(said(one).gaps[at], said(other).gaps[at])
    cause = "a tie within rounding" if gap < _ROUNDING else "no tie: an error"
    return f"token {at + 1}, where the two likeliest were {gap:.6f} apart ({cause})"


def _answers(run: ArmRun) -> str:
    """Two of the answers, complete ones if there are any, and what the arm had."""
    shown = [record for record in run.records if said(record).has_stopped] or run.records
    lines = ["Two of the answers:"]
    for record in [shown[0], shown[-1]][: len(shown)]:
        one = said(record)
        about = f', about "{one.title}"' if one.title else ""
        lines += ["", f"user {record.session + 1}{about}: {one.question}"]
        lines.append(f"model: {one.answer.strip()}{'' if one.has_stopped else ' ...'}")
    return "\n".join([*lines, "", "The second pass had:", run.budget_report])


_EXPERT_LABELS = (
    "output tokens/s",
    "all answered after, s",
    "prompt / output tokens",
    "experts on the device, GB",
    "experts in host memory, GB",
    "needed experts that were there (hits)",
    "needed experts that were not (misses)",
    "hit rate",
    "experts moved to the device, GB",
)


def _expert_cells(run: ArmRun) -> list[str]:
    engine, rate = run.engine, run.engine["expert_hit_rate"]
    return [
        f"{run.output_tokens_per_s:.1f}",
        f"{run.wall_s:.1f}",
        f"{run.prompt_tokens:,} / {run.output_tokens:,}",
        f"{run.sizes['experts_device_bytes'] / 1e9:.3f}",
        f"{run.sizes['experts_host_bytes'] / 1e9:.3f}",
        "-" if rate is None else f"{engine['expert_hits']:,}",
        "-" if rate is None else f"{engine['expert_misses']:,}",
        "-" if rate is None else f"{rate:.1%}",
        f"{engine['expert_bytes'] / 1e9:.2f}",
    ]


def experts_as_text(result: BenchResult) -> str:
    """What `hotset demo-moe` prints."""
    model, quarter = result.asked["model"], result.runs[1]
    num_experts, num_slots = quarter.sizes["experts_per_layer"], quarter.sizes["expert_slots"]
    title = (
        f"{model} (upcycled, not trained as a Mixture of Experts): "
        f"{result.asked['workload']['users']} users at once, {quarter.sizes['expert_layers']} "
        f"layers of {num_experts} experts"
    )
    headings = ("all experts resident", f"{num_slots} of {num_experts} resident")
    columns = zip(*map(_expert_cells, result.runs), strict=True)
    lines = [("", headings), *zip(_EXPERT_LABELS, columns, strict=True)]
    tokens = f"Tokens: identical in all {len(quarter.records)} answers."
    if pairs := differing(result):
        users = ", ".join(str(record.session + 1) for record, _ in pairs)
        tokens = f"Tokens: DIFFERENT in the answers of users {users}: an error."
    command = f"Next: hotset serve --model {model} --expert-slots {num_slots}"
    return "\n".join([_answers(quarter), "", title, aligned(lines), tokens, command])
