"""`hotset fleet`: replicas, fronts and all that joins them, on one machine."""

from pathlib import Path

import click

from hotset.cli.config_file import config_flag
from hotset.cli.fleet_flags import directory_flag, find_fleet, route_flag
from hotset.cli.options import Command, engine_options, flags
from hotset.cli.server_flags import ServerFlags, held_port, server_flags
from hotset.errors import ConfigError
from hotset.fleet.local_ray import require_ray
from hotset.fleet.scaling import ScalingOptions
from hotset.option_fields import options_of
from hotset.options import Options


@click.command(cls=Command)
@config_flag
@flags("scaling", options_of(ScalingOptions), ScalingOptions)
@click.option(
    "--fronts",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes that answer HTTP, on one port.",
)
@click.option(
    "--shared-gib",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Memory of a store that replicas share KV blocks by, in GiB; 0 is none. It needs "
    "valkey-server or redis-server.",
)
@directory_flag
@route_flag
@server_flags()
@engine_options
def command(
    scaling: ScalingOptions,
    fronts: int,
    shared_gib: float,
    directory: Path | None,
    route: str,
    server: ServerFlags,
    options: Options,
) -> None:
    r"""Serve one model by several replicas on this machine, with the API of `hotset serve`.

    Ray starts the replicas, watches them and replaces those that end; the streams of such a one go
    on at another. SIGTERM or Ctrl-C lets requests end; SIGHUP starts all replicas again, one by
    one, with the weights that the model's folder has then.

    \b
    Example:
      hotset fleet --replicas 2 --hot-gib 4 --port 8000
    """
    require_ray()
    if options.memory.remote and shared_gib:
        raise ConfigError(
            f"remote is {', '.join(options.memory.remote)} and shared_gib is {shared_gib:g}; give "
            "shared_gib 0, or leave remote out"
        )
    if (peer_url := options.memory.peer_url) is not None:
        raise ConfigError(
            f"peer_url is {peer_url}, and each replica needs one of its own; leave it out: where "
            "the model and its options allow it, replicas fetch from each other without it"
        )
    folder, _ = find_fleet(directory, None)
    with held_port(server) as held:
        from hotset.cli.running_fleet import Fleet, FleetFlags

        Fleet(folder, FleetFlags(options, scaling, fronts, shared_gib, route, held)).run()
