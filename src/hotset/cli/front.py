"""`hotset front`: the HTTP API over the replicas of a fleet."""

import dataclasses
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hotset.cli.config_file import config_flag
from hotset.cli.fleet_flags import directory_flag, find_fleet, secret_flag
from hotset.cli.options import Command
from hotset.cli.server_flags import ServerFlags, listening, server_flags
from hotset.errors import ConfigError
from hotset.fleet.router import ROUTES

if TYPE_CHECKING:
    from hotset.fleet.service import FleetService


@click.command(cls=Command)
@config_flag
@directory_flag
@secret_flag
@click.option(
    "--tls-ca",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Certificates (PEM) of who signs those of replicas: links use TLS.  [default: none]",
)
@click.option(
    "--route",
    type=click.Choice(list(ROUTES)),
    default=next(iter(ROUTES)),
    show_default=True,
    help="How a request's replica is chosen.",
)
@click.option(
    "--reuse-port",
    is_flag=True,
    help="Share the port with other fronts of this user, each of which gets some of the "
    "connections. Such a front offers no files and batches of its own.",
)
@server_flags
def command(
    server: ServerFlags,
    directory: Path | None,
    secret_file: Path | None,
    tls_ca: Path | None,
    route: str,
    reuse_port: bool,
) -> None:
    r"""Serve the OpenAI-compatible HTTP API by the replicas of a fleet, which may come and go.

    GET /health answers 503 until a replica is there. A request goes on at another replica when its
    own ends or drains. Without API keys the front takes requests from this machine only.

    \b
    Example:
      hotset replica --hot-gib 8 &
      hotset front --port 8000
    """
    folder, secret = find_fleet(directory, secret_file)
    tls = None if tls_ca is None else _client_tls(tls_ca)
    if reuse_port:
        server = dataclasses.replace(server, no_files=True)
    with listening(server, shares_port=reuse_port) as opened:
        from hotset.cli import serving

        def start() -> "FleetService":
            return _start(folder, secret, tls, route)

        serving.serve(start, opened, server.drain_s, until="waiting for replicas")


def _start(folder: Path, secret: bytes, tls: ssl.SSLContext | None, route: str) -> "FleetService":
    """A service that has its first replica."""
    from hotset.fleet.directory import Directory
    from hotset.fleet.service import FleetService
    from hotset.fleet.watch import Watcher

    service = FleetService(ROUTES[route]())
    try:
        Watcher(service, Directory(folder), secret, tls).wait()
    except BaseException:
        service.close()
        raise
    return service


def _client_tls(authorities: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(authorities)
    except OSError as error:  # SSLError too
        reason = getattr(error, "reason", None) or error.strerror
        raise ConfigError(f"tls_ca {authorities} cannot be used: {reason}") from error
    return context
