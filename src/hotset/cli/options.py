"""Options and behaviour that commands share."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from hotset.config import EngineConfig
from hotset.errors import ConfigError
from hotset.options import Option, options_of

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_ENGINE_OPTIONS = options_of(EngineConfig)


def _flag(option: Option) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """The flag of an engine's option, as its field declares it."""
    given: dict[str, Any] = {"default": option.default, "help": option.help}
    if option.if_none:
        given["help"] += f"  [default: {option.if_none}]"
    if option.kind is bool:
        is_pair = option.default is True
        given |= {"show_default": True} if is_pair else {"is_flag": True}
    else:
        type_ = click.Choice(option.choices) if option.choices else option.kind
        if option.kind is Path:
            type_ = click.Path(file_okay=False, path_type=Path)
        given |= {"type": type_, "show_default": option.default is not None}
    return click.option(*option.flags, option.name, **given)


def engine_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add the engine's options; the command gets them as `config`."""

    @functools.wraps(command)
    def wrapper(*args: Any, **options: Any) -> R:
        chosen = {name: options.pop(name) for name in list(options) if name in _ENGINE_OPTIONS}
        return command(*args, config=EngineConfig(**chosen), **options)

    wrapped: Callable[..., R] = wrapper
    for option in reversed(_ENGINE_OPTIONS.values()):
        if option.flags:
            wrapped = _flag(option)(wrapped)
    return wrapped


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
