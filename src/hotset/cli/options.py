"""Options and behaviour that commands share."""

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from hotset.errors import ConfigError
from hotset.option_fields import Option
from hotset.options import OPTIONS, Options

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def _flag(one: Option) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """The flag of an option, by what its field declares."""
    kind: Any = one.kind
    if one.choices:
        kind = click.Choice(one.choices)
    elif kind is Path:
        kind = click.Path(file_okay=False, path_type=Path)
    help_ = f"{one.help}  [default: {one.otherwise}]" if one.otherwise else one.help
    return click.option(
        *one.flags,
        one.name,
        type=kind,
        is_flag=one.kind is bool,
        default=one.default,
        show_default=one.default is not None and one.default is not False,
        help=help_,
    )


def engine_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add the flags of an engine; the command gets them as `options`."""

    @functools.wraps(command)
    def wrapper(*args: Any, **given: Any) -> R:
        chosen = {name: given.pop(name) for name in list(given) if name in OPTIONS}
        try:
            return command(*args, options=Options.of(**chosen), **given)
        except ConfigError as error:
            message = as_typed(str(error), click.get_current_context())
            raise ConfigError(message) from error

    wrapped: Callable[..., R] = wrapper
    for one in reversed(OPTIONS.values()):
        if one.flags:
            wrapped = _flag(one)(wrapped)
    return wrapped


def as_typed(message: str, context: click.Context) -> str:
    """A message with flags in place of the names of options, but for those of a TOML file.

    A name that is a word of English is an option's where the message begins with it.
    """
    first = message.split(maxsplit=1)[0] if message else ""

    def flag(name: re.Match[str]) -> str:
        is_typed = context.get_parameter_source(name[0]) is not ParameterSource.DEFAULT_MAP
        return f"--{name[0].replace('_', '-')}" if is_typed else name[0]

    names = [n for n, one in OPTIONS.items() if one.flags and ("_" in n or n == first)]
    return re.sub(rf"(?<![\w-])(?:{'|'.join(names)})(?![\w-])", flag, message)


def check_writable(path: Path) -> None:
    """Find out before a run of minutes that its result cannot be kept."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {path.parent} is no folder one may write to")


def interruptible(command: Callable[P, R]) -> Callable[P, R]:
    """End with one line and status 130 on Ctrl-C."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        try:
            return command(*args, **options)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            # All `finally` clauses have run. A model that is still being loaded, in a thread,
            # would abort the process while Python shuts down.
            sys.stdout.flush()
            os._exit(INTERRUPTED)

    return wrapper
