"""What commands share: flags from the fields that declare them, and errors that name flags."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from hotset.errors import ConfigError, HotsetError
from hotset.option_fields import Option
from hotset.options import OPTIONS, Options
from hotset.ranks.torchrun import is_other_rank

R = TypeVar("R")

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

as_json_flag = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, nothing else."
)


class Command(click.Command):
    """A command whose errors name options as they were typed; Ctrl-C ends it with one line."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        # Raw docstrings have click's mark "do not wrap" as two characters.
        self.help = (self.help or "").replace("\\b\n", "\b\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except HotsetError as error:
            error.args = (as_typed(str(error), ctx), *error.args[1:])
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            # All `finally` clauses have run. A model that is still being loaded, in a thread,
            # would abort the process while Python shuts down.
            sys.stdout.flush()
            os._exit(INTERRUPTED)


def flags(
    name: str, options: Iterable[Option], make: Callable[..., Any]
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Add the flags of options; the command gets what `make` makes of their values as `name`."""
    shown = [one for one in options if one.flags]
    names = {one.name: one.flags[0].partition("/")[0] for one in shown if "_" in one.name}

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(command)
        def wrapper(*args: Any, **given: Any) -> R:
            values = {one.name: given.pop(one.name) for one in shown}
            return command(*args, **{name: make(**values)}, **given)

        wrapped: Callable[..., R] = wrapper
        for one in reversed(shown):
            wrapped = _flag(one, names)(wrapped)
        return wrapped

    return decorate


engine_options = flags("options", OPTIONS.values(), Options.of)


def runs_on_ranks(command: Callable[..., R]) -> Callable[..., R]:
    """Where torchrun has started other ranks than the driver's, be one in place of the command."""

    @functools.wraps(command)
    def wrapper(*args: Any, options: Options, **given: Any) -> R:
        if is_other_rank(options.layout.num_gpus):
            from hotset.ranks.worker import serve_driver  # imports torch: not for --help

            serve_driver()
        return command(*args, options=options, **given)

    return wrapper


def given_only(**values: Any) -> dict[str, Any]:
    """The values of flags that were given, of flags whose default is None."""
    return {name: value for name, value in values.items() if value is not None}


def _flag(one: Option, names: Mapping[str, str]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """The flag of an option, by what its field declares; `names` are the flags of options."""
    kind: Any = one.kind
    if one.choices:
        kind = click.Choice(one.choices)
    elif kind is Path:
        is_file = one.name.endswith("_file")
        kind = click.Path(file_okay=is_file, dir_okay=not is_file, path_type=Path)
    is_list = one.kind == tuple[str, ...]
    otherwise = "" if one.default is not None else one.otherwise
    is_shown = one.default is not None and one.default is not False and one.default != ()
    return click.option(
        *one.flags,
        one.name,
        type=str if is_list else kind,
        metavar=one.metavar or None,
        is_flag=one.kind is bool,
        multiple=is_list,
        default=one.default,
        show_default=is_shown,
        help=_with_flags(f"{one.help}  [default: {otherwise}]" if otherwise else one.help, names),
    )


def as_typed(message: str, context: click.Context) -> str:
    """A message with flags in place of the names of options, but for those of a TOML file.

    A name that is a word of English is an option's where the message begins with "name is".
    """
    first = message.partition(" is ")[0]
    names = {
        param.name: max(param.opts, key=len)
        for param in context.command.params
        if isinstance(param, click.Option) and param.name
        if "_" in param.name or param.name == first
        if context.get_parameter_source(param.name) is not ParameterSource.DEFAULT_MAP
    }
    return _with_flags(message, names)


def _with_flags(text: str, names: Mapping[str, str]) -> str:
    """A text with the flags of `names` in place of these names."""
    pattern = rf"(?<![\w/-])(?:{'|'.join(names)})(?![\w/-])"
    return re.sub(pattern, lambda name: names[name[0]], text) if names else text


def check_writable(*paths: Path | None) -> None:
    """Find out before a run of minutes that its result cannot be kept."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ConfigError(
                f"{path} cannot be written: {path.parent} is no folder one may write to"
            )
