"""Flags of a command in a TOML file."""

from pathlib import Path
from typing import Any

import click

from hotset.errors import ConfigError
from hotset.foreign_text import ForeignTextError, parse_toml
from hotset.options import OPTIONS


def _read(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Let the flags a TOML file names be the defaults of those on the command line."""
    if path is None:
        return
    try:
        values: dict[str, Any] = parse_toml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ForeignTextError as error:
        raise ConfigError(f"{path} {error}") from error
    known = {param.name for param in ctx.command.params} - {"config_file", "dry_run"}
    lists = {one.name for one in ctx.command.params if getattr(one, "multiple", False)}
    named = {name.replace("-", "_"): value for name, value in values.items()}
    for name, value in named.items():
        if name not in known:
            raise ConfigError(f"{path}: there is no option {name!r}; see {ctx.command_path} --help")
        if isinstance(value, dict | list) and not (name in lists and isinstance(value, list)):
            raise ConfigError(f"{path}: {name} is a {type(value).__name__}; expected one value")
        if name in OPTIONS:
            try:
                taken = OPTIONS[name].check(value)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from error
            named[name] = taken if name in lists else value
    ctx.default_map = {**(ctx.default_map or {}), **named}


config_flag = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="TOML file with any of these options, such as `hot-gib = 8`; flags given here win.",
)
