"""`hotset fleet revoke`: no replica uses what one of them wrote to the stores."""

from pathlib import Path

import click

from hotset.cli.fleet_flags import directory_flag
from hotset.cli.options import Command
from hotset.fleet.directory import default_folder
from hotset.fleet.store import socket_of


@click.command(cls=Command)
@click.argument("name")
@directory_flag
@click.option(
    "--remote",
    metavar="URL",
    multiple=True,
    help="A store, as replicas have it; several times for several.  [default: the one that "
    "`hotset fleet` has started in the directory]",
)
def command(name: str, directory: Path | None, remote: tuple[str, ...]) -> None:
    r"""Have no replica use the KV blocks that the writer NAME wrote to the stores.

    NAME is what the writer has as --remote-writer: with `hotset fleet`, its id. Replicas hear of it
    within 10 seconds, and delete what they find of it. To shut a thief of the secret out, start all
    processes with a new one.

    \b
    Example:
      hotset fleet revoke replica-3
    """
    from hotset.memory.remote.revoke import revoke

    urls = remote or (f"unix://{socket_of(directory or default_folder())}",)
    for store in revoke(urls, name):
        click.echo(f"{store}: blocks of {name} are not used any more")
