"""`hotset demo`: the same conversations with and without the tiers."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from hotset.cli.options import Command, as_json_flag

if TYPE_CHECKING:
    from hotset.demo import DemoResult, Progress, Turn

_SHOWN_DIFFERENCES = 5
# Log probabilities this near may change places with the shape of a batch: float32 sums of the
# default model differ by up to 3e-5 with it.
_ROUNDING = 1e-4


@click.command(cls=Command)
@click.option("--users", type=click.IntRange(1, 256), default=24, show_default=True)
@click.option("--turns", type=click.IntRange(1, 16), default=4, show_default=True)
@click.option(
    "--document-tokens",
    type=click.IntRange(16, 4096),
    default=720,
    show_default=True,
    help="Length of the text that each user asks about.",
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(1, 512),
    default=40,
    show_default=True,
    help="Longest answer.",
)
@as_json_flag
def command(
    users: int, turns: int, document_tokens: int, answer_tokens: int, as_json: bool
) -> None:
    r"""Serve conversations whose contexts need several times the hot tier, on the CPU.

    Each user asks the default model about a text of Python's documentation, turn by turn: once
    with the hot tier alone, once with host and disk tiers under it. Takes some minutes, 2 GB of
    memory and 2 GB of disk (in the folder for temporary files).

    \b
    Example:
      hotset demo --users 12 --turns 3
    """
    from hotset.demo import Workload, run_demo  # imports torch: not for --help

    workload = Workload(users, turns, document_tokens, answer_tokens)
    with _LiveProgress(users * turns) as live:
        result = run_demo(workload, live.show)
    if as_json:
        click.echo(json.dumps(_as_dict(result)))
    else:
        _print_result(result)


class _LiveProgress:
    """A bar a pass, on stderr; where that is no terminal, a line for each eighth of a pass."""

    def __init__(self, total_turns: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True)
        self._total = total_turns
        self._bars = Bars(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("turns  {task.fields[rate]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._told = 0

    def __enter__(self) -> "_LiveProgress":
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def show(self, progress: "Progress") -> None:
        """Show how far a pass is."""
        name, turns, tokens = progress.name, progress.turns, progress.output_tokens
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=self._total, rate="loading")
            self._told = 0
            self._tell(f"{name}: loading the model")
            return
        rate = f"{tokens / max(progress.wall_s, 1e-9):5.1f} tokens/s"
        self._bars.update(self._tasks[name], completed=turns, rate=rate)
        eighths = turns * 8 // self._total
        if eighths > self._told:
            self._told = eighths
            self._tell(f"{name}: {turns} of {self._total} turns, {rate.strip()}")

    def _tell(self, line: str) -> None:
        if not self._console.is_terminal:
            print(f"demo: {line}", file=sys.stderr, flush=True)


def _as_dict(result: "DemoResult") -> dict[str, Any]:
    return {
        "users": result.workload.users,
        "turns": result.workload.turns,
        "hot_only": result.hot_only.as_dict(),
        "tiered": result.tiered.as_dict(),
        "speedup": result.speedup,
        "differing": [f"user {t.user + 1} turn {t.turn + 1}" for t, _ in result.differing],
    }


def _print_result(result: "DemoResult") -> None:
    from rich.console import Console
    from rich.table import Table

    one, two = result.hot_only, result.tiered
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print("\nTwo of the answers:")
    for turn in _answers_to_show(two.turns):
        console.print(f'\nuser {turn.user + 1}, about "{turn.title}": {turn.question}')
        console.print(f"model: {turn.answer.strip()}{'' if turn.is_complete else ' ...'}")
    console.print(f"\nThe second pass had:\n{two.report}\n")
    table = Table(title=_title(result), title_justify="left", title_style="")
    table.add_column("")
    for heading in ("hot tier alone", "with tiers", "ratio"):
        table.add_column(heading, justify="right")
    for label, first, second, digits in _rows(result):
        ratio = f"{second / first:.2f}" if first else ""
        table.add_row(label, f"{first:,.{digits}f}", f"{second:,.{digits}f}", ratio)
    console.print(table)
    for name, run in (("hot tier alone", one), ("with tiers", two)):
        if run.faults:
            faults = ", ".join(f"{count} {kind}" for kind, count in sorted(run.faults.items()))
            console.print(f"faults {name} (each cost a recompute, no token): {faults}")
    console.print(_verdict(result))


def _answers_to_show(turns: "list[Turn]") -> "list[Turn]":
    """The first user's first answer and the last user's last; complete ones if there are any."""
    shown = [turn for turn in turns if turn.is_complete] or turns
    return [shown[0], shown[-1]][: len(shown)]


def _title(result: "DemoResult") -> str:
    work, run = result.workload, result.tiered
    return (
        f"{work.users} users, {work.turns} turns each: contexts of {run.context_tokens:,} tokens, "
        f"{run.context_tokens / run.hot_tokens:.1f} times the hot tier of {run.hot_tokens:,}"
    )


def _rows(result: "DemoResult") -> list[tuple[str, float, float, int]]:
    one, two = result.hot_only, result.tiered
    rows = [
        ("output tokens/s", one.tokens_per_s, two.tokens_per_s, 1),
        ("time to first token, p50, s", one.ttft_s(0.5), two.ttft_s(0.5), 2),
        ("time to first token, p99, s", one.ttft_s(0.99), two.ttft_s(0.99), 2),
    ]
    if result.workload.turns > 1:
        first, second = (run.ttft_s(0.5, first_turn=1) for run in (one, two))
        rows.append(("  p50 after the first turn, s", first, second, 2))
    return [
        *rows,
        ("all answered after, s", one.wall_s, two.wall_s, 1),
        ("prompt tokens sent", one.prompt_tokens, two.prompt_tokens, 0),
        ("output tokens", one.output_tokens, two.output_tokens, 0),
        ("tokens computed", one.computed_tokens, two.computed_tokens, 0),
        ("  of these recomputed", one.recomputed_tokens, two.recomputed_tokens, 0),
        ("tokens fetched", one.fetched_tokens, two.fetched_tokens, 0),
        ("tokens read from disk", one.disk_read_tokens, two.disk_read_tokens, 0),
        ("preemptions", one.preemptions, two.preemptions, 0),
    ]


def _verdict(result: "DemoResult") -> str:
    num_answers, differing = len(result.hot_only.turns), result.differing
    if not differing:
        return f"Tokens: identical in all {num_answers} answers of the two passes."
    lines = [f"Tokens: DIFFERENT in {len(differing)} of {num_answers} answers:"]
    for one, other in differing[:_SHOWN_DIFFERENCES]:
        lines.append(f"  user {one.user + 1} turn {one.turn + 1}: {_why(one, other)}")
    if len(differing) > _SHOWN_DIFFERENCES:
        lines.append(f"  and {len(differing) - _SHOWN_DIFFERENCES} more")
    return "\n".join(lines)


def _why(one: "Turn", other: "Turn") -> str:
    """Where two answers part, and how sure the model was of the token there."""
    if one.prompt_ids != other.prompt_ids:
        return "it follows another answer that differs"
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return "one answer is longer"
    gap = max(one.gaps[at], other.gaps[at])
    cause = "a tie within rounding" if gap < _ROUNDING else "no tie: an error"
    return f"token {at + 1}, where the two likeliest were {gap:.6f} apart ({cause})"
