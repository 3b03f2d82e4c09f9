"""`hotset demo-moe`: the same questions with all experts resident and with a quarter of them."""

import json

import click

from hotset.cli.options import Command, as_json_flag
from hotset.cli.progress import make_say


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
    minutes, 5 GB of memory and, once, 1.4 GB of disk. `hotset bench --preset demo-moe` runs the
    same and prints other figures.

    \b
    Example:
      hotset demo-moe --users 8
    """
    from hotset.bench.demo import experts_as_dict, experts_as_text, run_demo  # import torch

    result = run_demo("demo-moe", make_say(), users=users, output_tokens=answer_tokens)
    click.echo(json.dumps(experts_as_dict(result)) if as_json else experts_as_text(result))
