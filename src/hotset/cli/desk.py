"""`hotset desk`: files, batches and limits of keys for the fronts of a fleet."""

import ssl
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
    server_tls,
    tls_ca_flag,
    tls_key_flag,
)
from hotset.cli.options import Command
from hotset.cli.server_flags import ServerFlags, listening, server_flags
from hotset.fleet.address import Address


@click.command(cls=Command)
@config_flag
@directory_flag
@secret_flag
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="HOST:PORT, or the path of a Unix socket.  [default: desk.sock in the directory]",
)
@fronts_flag
@click.option(
    "--tls-cert",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Certificate of the desk (PEM, with those above it): fronts use TLS.  [default: none]",
)
@tls_key_flag
@tls_ca_flag
@route_flag
@server_flags("host", "port", "cors_origins")
def command(
    server: ServerFlags,
    directory: Path | None,
    secret_file: Path | None,
    listen: str | None,
    fronts: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    route: str,
) -> None:
    r"""Keep files and stored responses, run batches and lease limits, for all fronts of a fleet.

    Fronts are told where it is by --desk, and pass requests for files and batches on to it. Without
    it chats go on, and each front gives keys its part of their limits. Started again, it goes on
    with its batches behind the last line that was written, and without the stored responses.

    \b
    Example:
      hotset desk --listen 127.0.0.1:8100 --fronts 2 &
      hotset front --port 8000 --desk 127.0.0.1:8100 --fronts 2 --rank 0
    """
    folder, secret = find_fleet(directory, secret_file)
    address = Address.of(listen or str(folder.resolve() / "desk.sock"))
    tls: ssl.SSLContext | None = None if tls_ca is None else client_tls(tls_ca)
    server_tls(tls_cert, tls_key)  # which raises where they cannot be used
    with listening(server, address=address) as opened:
        from hotset.cli import serving
        from hotset.cli.fleet_service import connect_fleet
        from hotset.fleet.leases import Ledger
        from hotset.server.desk import DeskEntry
        from hotset.server.response_store import ResponseStore

        limits = {one.name: one.limits for one in opened.config.keys.tenants}
        ledger = Ledger(limits, num_fronts=fronts)
        responses = ResponseStore.of(opened.config.limits)
        serving.serve(
            lambda: connect_fleet(folder, secret, tls, route),
            opened,
            server.drain_s,
            until="waiting for replicas",
            entry=lambda api: DeskEntry(api, ledger, responses, secret),
            certificate=None if tls_cert is None else (tls_cert, tls_key),
            is_desk=True,
        )
