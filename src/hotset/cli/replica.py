"""`hotset replica`: an engine for the fronts of a fleet."""

import os
from pathlib import Path

import click

from hotset.cli.config_file import config_flag
from hotset.cli.fleet_flags import (
    directory_flag,
    find_fleet,
    secret_flag,
    server_tls,
    tls_key_flag,
)
from hotset.cli.options import Command, engine_options
from hotset.cli.server_flags import log_format_flag, log_level_flag
from hotset.errors import ConfigError
from hotset.options import Options


@click.command(cls=Command)
@config_flag
@directory_flag
@secret_flag
@click.option(
    "--id",
    "replica_id",
    metavar="NAME",
    help="What fronts call this replica; no other has it.  [default: made of the process's id]",
)
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="HOST:PORT, where port 0 is any free, or the path of a Unix socket. Fronts are told this "
    "machine's name for 0.0.0.0.  [default: a socket in the directory]",
)
@click.option(
    "--drain-s",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="How long requests may go on after SIGTERM or Ctrl-C before fronts move them to other "
    "replicas; a second one moves them at once.",
)
@click.option(
    "--tls-cert",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Certificate of this replica (PEM, with those above it): links use TLS.  [default: none]",
)
@tls_key_flag
@log_format_flag
@log_level_flag
@engine_options
def command(
    directory: Path | None,
    replica_id: str | None,
    listen: str | None,
    secret_file: Path | None,
    drain_s: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    log_format: str,
    log_level: str,
    options: Options,
) -> None:
    r"""Run one engine of a fleet: no HTTP, but links to fronts, which `hotset front` runs.

    Fronts and replicas prove to each other that they have the fleet secret. Without TLS, a
    machine on the way between them can read prompts and answers.

    \b
    Example:
      hotset replica --hot-gib 8 &
      hotset front --port 8000
    """
    from hotset.cli import running_replica
    from hotset.fleet.address import Address
    from hotset.fleet.listener import Listener
    from hotset.server import logs

    replica_id = f"replica-{os.getpid()}" if replica_id is None else _checked_id(replica_id)
    folder, secret = find_fleet(directory, secret_file)
    address = Address.of(listen or str(folder.resolve() / f"{replica_id}.sock"))
    tls = server_tls(tls_cert, tls_key)
    logs.set_up(log_format, log_level)  # type: ignore[arg-type]  # click has checked it
    # Before the seconds that the model takes.
    listener = Listener(address, secret, replica_id=replica_id, tls=tls)
    running_replica.run(options, listener, folder, drain_s)


def _checked_id(text: str) -> str:
    """It is the name of a file, and stands in lines of logs and labels of metrics."""
    if not text.replace("-", "").replace("_", "").replace(".", "").isalnum() or text[0] == ".":
        raise ConfigError(f"id {text!r} is none; expected letters, digits, '-', '_' and '.'")
    return text
