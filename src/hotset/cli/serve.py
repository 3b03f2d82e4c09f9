"""`hotset serve`: the OpenAI-compatible HTTP server."""

import contextlib
import ipaddress
import os
import re
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hotset.cli.options import engine_options, interruptible
from hotset.errors import ConfigError, HotsetError
from hotset.foreign_text import ForeignTextError, parse_toml
from hotset.options import OPTIONS, Options

if TYPE_CHECKING:
    from hotset.engine.service import EngineService
    from hotset.server.keys import Keys

R = TypeVar("R")

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
_KEEP_ALIVE_S = 75  # longer than the usual proxy keeps its own connections
_BACKLOG = 2048

_LIMITS: list[tuple[str, type, float | None, str]] = [
    ("max_body_mib", float, 4.0, "Largest JSON body, in MiB."),
    ("max_file_mib", float, 200.0, "Largest uploaded file, in MiB."),
    ("max_prompt_tokens", int, None, "Longest prompt.  [default: what the context holds]"),
    ("max_tokens", int, None, "Most tokens of one output.  [default: what the context holds]"),
    ("max_n", int, 16, "Most outputs for one prompt."),
    ("max_prompts", int, 128, "Most prompts in one text completion."),
    ("max_stop", int, 16, "Most stop strings, and stop tokens."),
    ("max_schema_kib", float, 64.0, "Largest JSON schema, in KiB."),
    ("max_prompt_logprobs", int, 2**22, "Most log-probabilities of prompts in one answer."),
    ("max_schema_depth", int, 32, "Deepest JSON schema."),
    ("max_stored", int, 1000, "Most responses of /v1/responses that are kept for one key."),
    ("max_stored_mib", float, 64.0, "Most that these may take, in MiB."),
    ("max_queue", int, 1024, "Requests that may wait; more are refused with 429."),
    ("request_timeout_s", float, 600.0, "Longest a request may take, in seconds."),
]


def _limit_options(command: Callable[..., R]) -> Callable[..., R]:
    for name, kind, default, text in reversed(_LIMITS):
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            show_default=default is not None,
            help=text,
        )(command)
    return command


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
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
            raise ConfigError(f"{path}: there is no option {name!r}; see hotset serve --help")
        if isinstance(value, dict | list) and not (name in lists and isinstance(value, list)):
            raise ConfigError(f"{path}: {name} is a {type(value).__name__}; expected one value")
        if name in OPTIONS:
            try:
                OPTIONS[name].check(value)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from error
    ctx.default_map = {**(ctx.default_map or {}), **named}


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file with any of these options, such as `port = 8000`; flags given here win.",
)
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
@_limit_options
@engine_options
@interruptible
def command(
    host: str,
    port: int,
    keys_file: Path | None,
    files_path: Path | None,
    files_gib: float,
    no_files: bool,
    drain_s: int,
    cors_origins: tuple[str, ...],
    log_format: str,
    log_level: str,
    otlp_endpoint: str | None,
    dry_run: bool,
    options: Options,
    **limits: Any,
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
    from hotset.server.keys import ENVIRONMENT, Keys

    _check_origins(cors_origins)
    keys = Keys()
    if keys_file is not None:
        keys.read_file(keys_file)
    # The engine's process has no more use for it, nor has anything it starts.
    keys.read_text(os.environ.pop(ENVIRONMENT, ""))
    _require_keys(host, keys)
    listener = _listen(host, port)  # before the seconds that imports and the model take

    import platformdirs
    import uvicorn

    from hotset.engine.service import EngineService
    from hotset.server import logs
    from hotset.server.app import Api, ServerConfig
    from hotset.server.limits import Limits
    from hotset.server.tracing import Tracer

    logs.set_up(log_format, log_level)  # type: ignore[arg-type]  # click has checked it
    where = f"http://{_printable(listener)}"
    if files_path is None:
        files_path = Path(platformdirs.user_data_dir("hotset")) / "files"
    server_config = ServerConfig(
        keys=keys,
        host_names=None if keys else _LOCAL_NAMES | {host.lower(), f"[{host.lower()}]"},
        limits=Limits(**limits),
        files_path=None if no_files else files_path,
        files_gib=files_gib,
        tracer=None if otlp_endpoint is None else Tracer.to_collector(otlp_endpoint),
        cors_origins=cors_origins,
    )
    if dry_run:
        with listener, contextlib.closing(EngineService(options)) as service:
            _warn_of_no_template(service)
            click.echo(f"{service.report}\nwould serve {service.model.name} at {where}/v1")
        return
    failures: list[HotsetError] = []

    def on_ready(service: EngineService) -> None:
        _warn_of_no_template(service)
        click.echo(f"{service.report}\nserving {service.model.name} at {where}/v1", err=True)
        click.echo(f"status page {where}/, API {where}/docs, metrics {where}/metrics", err=True)

    def on_failure(error: HotsetError) -> None:
        failures.append(error)
        server.should_exit = True

    api = Api(options, server_config, on_ready=on_ready, on_failure=on_failure)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if not self.should_exit:
                api.drain()
                open_requests = api.gate.counts.open
                click.echo(f"stopping; {open_requests} requests have {drain_s} s", err=True)
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            api,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=drain_s,
        )
    )
    _raise_file_limit()
    click.echo(f"listening at {where}; loading the model", err=True)
    with listener:
        server.run(sockets=[listener])
    if failures:
        raise failures[0]
    if not server.started:
        sys.exit(1)  # it has said why


def _warn_of_no_template(service: "EngineService") -> None:
    from hotset.text.prompt import PromptEncoder

    message = PromptEncoder(service.model).no_template
    if message is not None:
        click.echo(f"warning: {message}; chats are answered with 400", err=True)


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


def _raise_file_limit() -> None:
    """A connection is an open file, and 1,024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _printable(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
