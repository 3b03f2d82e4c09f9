"""How far runs are, on stderr. Imports no torch."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hotset.bench.runs import Say

_PROGRESS_S = 5.0


def make_say() -> "Say":
    """Lines, and progress each five seconds; on a terminal progress is one line that changes."""
    from hotset.bench.runs import Say

    shown = sys.stderr.isatty()
    last_s = time.monotonic()
    width = 0

    def line(text: str) -> None:
        nonlocal width
        click.echo("\r" + " " * width + "\r" if width else "", err=True, nl=False)
        width = 0
        click.echo(text, err=True)

    def progress(make: Callable[[], str]) -> None:
        nonlocal last_s, width
        now_s = time.monotonic()
        if now_s - last_s < (1.0 if shown else _PROGRESS_S):
            return
        last_s = now_s
        text = make()
        if shown:
            click.echo("\r" + text.ljust(width), err=True, nl=False)
            width = len(text)
        else:
            click.echo(text, err=True)

    return Say(line, progress)
