"""`hotset demo`: the same conversations with and without the tiers."""

import json

import click

from hotset.cli.options import Command, as_json_flag
from hotset.cli.progress import make_say


@click.command(cls=Command)
@click.option("--users", type=click.IntRange(1, 256), default=24, show_default=True)
@click.option("--turns", type=click.IntRange(1, 16), default=4, show_default=True)
@click.option(
    "--document-tokens",
    type=click.IntRange(16, 4096),
    default=640,
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
    memory and 2 GB of disk (in the folder for temporary files). `hotset bench --preset demo` runs
    the same and prints other figures.

    \b
    Example:
      hotset demo --users 12 --turns 3
    """
    from hotset.bench.demo import run_demo, tiers_as_dict, tiers_as_text  # import torch

    result = run_demo(
        "demo",
        make_say(),
        users=users,
        turns=turns,
        first_tokens=document_tokens,
        output_tokens=answer_tokens,
    )
    click.echo(json.dumps(tiers_as_dict(result)) if as_json else tiers_as_text(result))
