"""`hotset demo-moe`: the same questions with all experts resident and with a quarter of them."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from hotset.cli.options import Command, as_json_flag

if TYPE_CHECKING:
    from hotset.demo_moe import DemoResult, PassResult, Progress


@click.command(cls=Command)
@click.option("--users", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option(
    "--answer-tokens",
    type=click.IntRange(1, 512),
    default=48,
    show_default=True,
    help="Longest answer.",
)
@as_json_flag
def command(users: int, answer_tokens: int, as_json: bool) -> None:
    r"""Run a small Mixture of Experts with a quarter of its experts resident, on the CPU.

    The model is the default one, upcycled: each of its MLPs was copied into eight experts that
    differ by seeded noise, two for each token. It was not trained as a Mixture of Experts. Several
    users ask it at once, first with all experts resident, then with a quarter of them. Takes two
    minutes, 5 GB of memory and, once, 1.4 GB of disk.

    \b
    Example:
      hotset demo-moe --users 8
    """
    from hotset.demo_moe import Workload, run_demo  # imports torch: not for --help

    show = _Shown(users * answer_tokens)
    result = run_demo(Workload(users, answer_tokens), show)
    if as_json:
        click.echo(json.dumps(_as_dict(result)))
    else:
        _print_result(result)


class _Shown:
    """A line on stderr for each eighth of a pass."""

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._eighths: dict[str, int] = {}

    def __call__(self, progress: "Progress") -> None:
        """Show how far a pass is."""
        name, tokens = progress.name, progress.output_tokens
        if name not in self._eighths:
            self._eighths[name] = 0
            self._tell(f"{name}: starting")
        eighths = tokens * 8 // self._most_tokens
        if eighths > self._eighths[name]:
            self._eighths[name] = eighths
            rate = tokens / max(progress.wall_s, 1e-9)
            self._tell(
                f"{name}: {tokens} of at most {self._most_tokens} tokens, {rate:.1f} tokens/s"
            )

    def _tell(self, line: str) -> None:
        print(f"demo-moe: {line}", file=sys.stderr, flush=True)


def _as_dict(result: "DemoResult") -> dict[str, Any]:
    return {
        "model": result.model,
        "users": result.workload.users,
        "num_layers": result.num_layers,
        "num_experts": result.num_experts,
        "num_slots": result.num_slots,
        "all_experts": result.all_here.as_dict(),
        "quarter": result.quarter.as_dict(),
        "differing": [user + 1 for user in result.differing],
    }


def _print_result(result: "DemoResult") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for answer in result.quarter.answers[:2]:
        console.print(f"\n{answer.question}")
        console.print(f"model: {answer.text.strip()}{'' if answer.is_complete else ' ...'}")
    console.print(f"\nThe second pass had:\n{result.quarter.report}\n")
    table = Table(
        title=f"{result.model} (upcycled, not trained as a Mixture of Experts): "
        f"{result.workload.users} users at once, {result.num_layers} layers of "
        f"{result.num_experts} experts",
        title_justify="left",
        title_style="",
    )
    table.add_column("")
    for heading in ("all experts resident", f"{result.num_slots} of {result.num_experts} resident"):
        table.add_column(heading, justify="right")
    columns = [_cells(run) for run in (result.all_here, result.quarter)]
    for label, *cells in zip(_LABELS, *columns, strict=True):
        table.add_row(label, *cells)
    console.print(table)
    if result.differing:
        users = ", ".join(str(user + 1) for user in result.differing)
        console.print(f"Tokens: DIFFERENT in the answers of users {users}: an error.")
    else:
        console.print(f"Tokens: identical in all {len(result.quarter.answers)} answers.")
    console.print(f"Next: hotset serve --model {result.model} --expert-slots {result.num_slots}")


_LABELS = (
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


def _cells(run: "PassResult") -> list[str]:
    rate = run.hit_rate
    return [
        f"{run.tokens_per_s:.1f}",
        f"{run.wall_s:.1f}",
        f"{run.prompt_tokens:,} / {run.output_tokens:,}",
        f"{run.device_bytes / 1e9:.3f}",
        f"{run.host_bytes / 1e9:.3f}",
        "-" if rate is None else f"{run.hits:,}",
        "-" if rate is None else f"{run.misses:,}",
        "-" if rate is None else f"{rate:.1%}",
        f"{run.moved_bytes / 1e9:.2f}",
    ]
