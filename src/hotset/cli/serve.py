"""`hotset serve`: the OpenAI-compatible HTTP server."""

import functools
import ipaddress
import math
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.cli.config_file import config_flag
from hotset.cli.options import Command, engine_options, flags
from hotset.errors import ConfigError
from hotset.option_fields import options_of
from hotset.options import Options
from hotset.server.limits import Limits

if TYPE_CHECKING:
    from hotset.server.app import ServerConfig
    from hotset.server.keys import Keys

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_BACKLOG = 2048


@click.command(cls=Command)
@config_flag
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any free."
)
@click.option(
    "--api-keys",
    "keys_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with a table for each key: see docs/server.md. HOTSET_API_KEYS=NAME:KEY,... "
    "adds some.  [default: no keys, which only a local address may have]",
)
@click.option(
    "--files-path",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for uploaded files and batches.  [default: in the platform's data folder]",
)
@click.option(
    "--files-gib", type=float, default=4.0, show_default=True, help="Most a key may keep."
)
@click.option("--no-files", is_flag=True, help="Offer neither /v1/files nor /v1/batches.")
@click.option(
    "--drain-s",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="How long requests may go on after SIGTERM or Ctrl-C; a second one ends them.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin, such as https://chat.example.org, use the server from a "
    "browser; * is any page. May be given several times.  [default: none]",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info"
)
@click.option("--otlp-endpoint", help="Send traces to this OTLP/HTTP address.  [default: none]")
@click.option("--dry-run", is_flag=True, help="Set everything up, print what went where, and exit.")
@flags("limits", options_of(Limits), Limits)
@engine_options
def command(
    host: str,
    port: int,
    keys_file: Path | None,
    files_gib: float,
    cors_origins: tuple[str, ...],
    log_format: str,
    log_level: str,
    drain_s: int,
    dry_run: bool,
    limits: Limits,
    options: Options,
    **given: Any,
) -> None:
    r"""Serve the OpenAI-compatible HTTP API, with a status page at / and the API at /docs.

    GET /health answers 503 until the model is loaded. Without API keys the server takes requests
    from this machine only.

    \b
    Example:
      hotset serve --port 8000
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}'
    """
    _check_origins(cors_origins)
    if not 0 < files_gib < math.inf:
        raise ConfigError(f"files_gib is {files_gib}; expected a size above 0 GiB")
    keys = _read_keys(keys_file)
    _require_keys(host, keys)
    with _listen(host, port) as listener:  # before the seconds that imports and the model take
        from hotset.cli import serving
        from hotset.engine.service import EngineService
        from hotset.server import logs

        logs.set_up(log_format, log_level)  # type: ignore[arg-type]  # click has checked it
        config = _server_config(keys, host, **given)
        config.files_gib = files_gib
        config.limits, config.cors_origins = limits, cors_origins
        where = f"http://{_printable(listener)}"
        if dry_run:
            serving.dry_run(functools.partial(EngineService, options), where)
        else:  # in a process of its own, where HTTP cannot delay its steps
            start = functools.partial(EngineService, options, own_process=True)
            serving.serve(start, config, listener, where, drain_s)


def _server_config(
    keys: "Keys",
    host: str,
    *,
    files_path: Path | None,
    no_files: bool,
    otlp_endpoint: str | None,
) -> "ServerConfig":
    import platformdirs

    from hotset.server.app import ServerConfig
    from hotset.server.tracing import Tracer

    if not no_files and files_path is None:
        files_path = Path(platformdirs.user_data_dir("hotset")) / "files"
    return ServerConfig(
        keys=keys,
        host_names=None if keys else _LOCAL_NAMES | {host.lower(), f"[{host.lower()}]"},
        files_path=None if no_files else files_path,
        tracer=None if otlp_endpoint is None else Tracer.to_collector(otlp_endpoint),
    )


def _read_keys(keys_file: Path | None) -> "Keys":
    from hotset.server.keys import ENVIRONMENT, Keys

    keys = Keys()
    if keys_file is not None:
        keys.read_file(keys_file)
    # The engine's process has no more use for it, nor has anything it starts.
    keys.read_text(os.environ.pop(ENVIRONMENT, ""))
    return keys


def _check_origins(origins: tuple[str, ...]) -> None:
    """An origin is what browsers send: a scheme, a host and a port if it is not the usual one."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors-origin {origin!r} is no origin; expected SCHEME://HOST[:PORT] without a "
                "path, such as https://chat.example.org, or *"
            )


def _require_keys(host: str, keys: "Keys") -> None:
    """Anybody who can reach the server may use it, unless there are keys."""
    if keys or host.lower() == "localhost":
        return
    try:
        if ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            return
    except ValueError:
        pass  # a name: it may be anything
    raise ConfigError(
        f"host {host} can be reached from other machines, which needs API keys; give --api-keys "
        "FILE or HOTSET_API_KEYS=NAME:KEY, or listen on 127.0.0.1"
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error
    return listener


def _printable(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
