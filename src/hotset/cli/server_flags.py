"""How a server is reached and by whom: flags of `hotset serve` and of what serves a fleet."""

import contextlib
import functools
import ipaddress
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.cli.options import flags
from hotset.errors import ConfigError
from hotset.fleet.address import Address, bound
from hotset.option_fields import options_of
from hotset.server.limits import Limits

if TYPE_CHECKING:
    from hotset.server.app import ServerConfig
    from hotset.server.keys import Keys

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_BACKLOG = 2048

log_format_flag = click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
log_level_flag = click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info"
)
# Names of parameters that are not as those of their flags.
_FLAG_NAMES = {"keys_file": "--api-keys", "cors_origins": "--cors-origin"}
# By the name of the parameter.
_FLAGS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "host": click.option(
        "--host", default="127.0.0.1", show_default=True, help="Address to listen on."
    ),
    "port": click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="0 is any free.",
    ),
    "keys_file": click.option(
        "--api-keys",
        "keys_file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="TOML file with a table for each key: see docs/server.md. "
        "HOTSET_API_KEYS=NAME:KEY,... adds some.  [default: no keys, which only a local address "
        "may have]",
    ),
    "files_path": click.option(
        "--files-path",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for uploaded files and batches.  [default: in the platform's data folder]",
    ),
    "files_gib": click.option(
        "--files-gib", type=float, default=4.0, show_default=True, help="Most a key may keep."
    ),
    "no_files": click.option(
        "--no-files", is_flag=True, help="Offer neither /v1/files nor /v1/batches."
    ),
    "drain_s": click.option(
        "--drain-s",
        type=click.IntRange(0),
        default=30,
        show_default=True,
        help="How long requests may go on after SIGTERM or Ctrl-C; a second one ends them.",
    ),
    "cors_origins": click.option(
        "--cors-origin",
        "cors_origins",
        multiple=True,
        metavar="ORIGIN",
        help="Let pages of this origin, such as https://chat.example.org, use the server from a "
        "browser; * is any page. May be given several times.  [default: none]",
    ),
    "log_format": log_format_flag,
    "log_level": log_level_flag,
    "otlp_endpoint": click.option(
        "--otlp-endpoint", help="Send traces to this OTLP/HTTP address.  [default: none]"
    ),
    "limits": flags("limits", options_of(Limits), Limits),
}


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """The values of the flags, as they were given; of those that a command has."""

    keys_file: Path | None
    files_path: Path | None
    files_gib: float
    drain_s: int
    log_format: str
    log_level: str
    otlp_endpoint: str | None
    limits: Limits
    host: str = "127.0.0.1"
    port: int = 0
    no_files: bool = False
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenServer:
    """What a server starts with.

    Attributes:
        listener: its socket; nothing answers there yet.
        where: its address, as clients write it.
    """

    config: "ServerConfig"
    listener: socket.socket
    where: str


def server_flags(*left_out: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the flags, but for some; the command gets their values as `server`."""
    names = [name for name in _FLAGS if name not in left_out]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapper(*args: Any, **given: Any) -> Any:
            values = {name: given.pop(name) for name in names}
            return command(*args, server=ServerFlags(**values), **given)

        wrapped: Callable[..., Any] = wrapper
        for name in reversed(names):
            wrapped = _FLAGS[name](wrapped)
        return wrapped

    return decorate


@contextlib.contextmanager
def listening(
    server: ServerFlags, *, shares_port: bool = False, address: Address | None = None
) -> Iterator[OpenServer]:
    """Listen, and set up logs, before the seconds that imports and a model take.

    Args:
        server: what was asked for.
        shares_port: with other servers of this user, each of which gets some of the connections.
        address: where, in place of host and port.

    Raises:
        ConfigError: a flag's value cannot be used; nothing listens.
    """
    _check(server)
    keys = _read_keys(server.keys_file)
    if address is None:
        address = Address(host=server.host, port=server.port)
        listener = _bind(server.host, server.port, shares_port=shares_port)
        if not shares_port:  # or the others would get no connections meanwhile
            listener.listen(_BACKLOG)
    else:
        listener = address.listen()
    with listener:
        if address.host is not None:
            _require_keys(address.host, keys)
        from hotset.server import logs

        logs.set_up(server.log_format, server.log_level)  # type: ignore[arg-type]  # click has checked it
        where = str(bound(listener))
        if address.host is not None:
            where = f"http://{where}"
        yield OpenServer(_config(server, keys), listener, where)


@contextlib.contextmanager
def held_port(server: ServerFlags) -> Iterator[ServerFlags]:
    """Keep a port for other processes of this user that share it; the flags with its number.

    Raises:
        ConfigError: a flag's value cannot be used.
    """
    from hotset.server.keys import ENVIRONMENT

    _check(server)
    text = os.environ.get(ENVIRONMENT)
    _require_keys(server.host, _read_keys(server.keys_file))
    if text is not None:
        os.environ[ENVIRONMENT] = text
    with _bind(server.host, server.port, shares_port=True) as held:
        yield replace(server, port=held.getsockname()[1])


def server_argv(server: ServerFlags, *left_out: str) -> list[str]:
    """The flags on the command line of another process, but for some."""
    argv = []
    for one in fields(ServerFlags):
        value = getattr(server, one.name)
        flag = _FLAG_NAMES.get(one.name, f"--{one.name.replace('_', '-')}")
        if one.name in left_out or one.name == "limits" or value is None or value is False:
            continue
        if value is True:
            argv.append(flag)
            continue
        for part in value if isinstance(value, tuple) else (value,):
            argv += [flag, str(part)]
    for limit in options_of(Limits):
        value = getattr(server.limits, limit.name)
        if value != limit.default:
            argv += [limit.flags[0], str(value)]
    return argv


def _config(server: ServerFlags, keys: "Keys") -> "ServerConfig":
    import platformdirs

    from hotset.server.app import ServerConfig
    from hotset.server.tracing import Tracer

    host, files_path = server.host.lower(), server.files_path
    if files_path is None:
        files_path = Path(platformdirs.user_data_dir("hotset")) / "files"
    collector = server.otlp_endpoint
    return ServerConfig(
        keys=keys,
        host_names=None if keys else _LOCAL_NAMES | {host, f"[{host}]"},
        limits=server.limits,
        files_path=None if server.no_files else files_path,
        files_gib=server.files_gib,
        tracer=None if collector is None else Tracer.to_collector(collector),
        cors_origins=server.cors_origins,
    )


def _read_keys(keys_file: Path | None) -> "Keys":
    from hotset.server.keys import ENVIRONMENT, Keys

    keys = Keys()
    if keys_file is not None:
        keys.read_file(keys_file)
    # The engine's process has no more use for it, nor has anything it starts.
    keys.read_text(os.environ.pop(ENVIRONMENT, ""))
    return keys


def _check(server: ServerFlags) -> None:
    """Raise ConfigError where a flag's value cannot be used.

    An origin is what browsers send: a scheme, a host and a port if it is not the usual one.
    """
    if not 0 < server.files_gib < math.inf:
        raise ConfigError(f"files_gib is {server.files_gib}; expected a size above 0 GiB")
    for origin in server.cors_origins:
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


def _bind(host: str, port: int, *, shares_port: bool) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shares_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((host, port))
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error
    return listener
