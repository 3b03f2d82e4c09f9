"""`hotset front`: the HTTP API over the replicas of a fleet."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import click

from hotset.cli.config_file import config_flag
from hotset.cli.fleet_flags import (
    client_tls,
    directory_flag,
    find_fleet,
    fronts_flag,
    route_flag,
    secret_flag,
    tls_ca_flag,
)
from hotset.cli.options import Command
from hotset.cli.server_flags import ServerFlags, listening, server_flags
from hotset.errors import ConfigError
from hotset.fleet.address import Address

_FIRST_REPLICA_S = 10.0


@click.command(cls=Command)
@config_flag
@directory_flag
@secret_flag
@tls_ca_flag
@route_flag
@click.option(
    "--reuse-port",
    is_flag=True,
    help="Share the port with other fronts of this user, each of which gets some of the "
    "connections. Such a front offers no files and batches of its own.",
)
@click.option(
    "--desk",
    metavar="ADDRESS",
    help="Of the fleet's desk, which has files, batches and limits of keys: HOST:PORT, or the path "
    "of a Unix socket.  [default: this front has its own]",
)
@fronts_flag
@click.option(
    "--rank",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Which of the fronts this is, from 0.",
)
@server_flags()
def command(
    server: ServerFlags,
    directory: Path | None,
    secret_file: Path | None,
    tls_ca: Path | None,
    route: str,
    reuse_port: bool,
    desk: str | None,
    fronts: int,
    rank: int,
) -> None:
    r"""Serve the OpenAI-compatible HTTP API by the replicas of a fleet, which may come and go.

    GET /health answers 503 until a replica is there. A request goes on at another replica when its
    own ends or drains. Without API keys the front takes requests from this machine only.

    \b
    Example:
      hotset replica --hot-gib 8 &
      hotset front --port 8000
    """
    if rank >= fronts:
        raise ConfigError(f"rank is {rank} and there are {fronts} fronts; expected less")
    folder, secret = find_fleet(directory, secret_file)
    tls = None if tls_ca is None else client_tls(tls_ca)
    address = None if desk is None else Address.of(desk)
    if reuse_port or desk is not None:
        server = dataclasses.replace(server, no_files=True)
    with listening(server, shares_port=reuse_port) as opened:
        from hotset.cli import serving
        from hotset.cli.fleet_service import connect_fleet
        from hotset.server.desk import Desk

        if address is not None:
            opened.config.desk = Desk(
                address,
                secret,
                rank=rank,
                num_fronts=fronts,
                tls=None if address.host is None else tls,
            )
        opened.config.fronts_path = folder / "fronts"
        with ThreadPoolExecutor(1) as pool:
            service = pool.submit(connect_fleet, folder, secret, tls, route)
            if reuse_port:  # another front may serve, which answers more than 503
                wait([service], _FIRST_REPLICA_S)
            serving.serve(service.result, opened, server.drain_s, until="waiting for replicas")
