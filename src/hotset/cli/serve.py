"""`hotset serve`: the OpenAI-compatible HTTP server."""

import socket
import sys
from typing import TYPE_CHECKING

import click

from hotset.cli.options import engine_options, interruptible
from hotset.config import EngineConfig
from hotset.errors import ConfigError, HotsetError

if TYPE_CHECKING:
    from hotset.engine.service import EngineService

# Streams that still run at Ctrl-C get this long.
_SHUTDOWN_S = 3


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any free."
)
@engine_options
@interruptible
def command(host: str, port: int, config: EngineConfig) -> None:
    r"""Serve the OpenAI-compatible HTTP API.

    POST /v1/chat/completions and /v1/completions, GET /v1/models, and GET /health, which
    answers 503 until the model is loaded.

    \b
    Example:
      hotset serve --port 8000
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}'
    """
    listener = _listen(host, port)  # before the seconds that imports and the model take

    import uvicorn

    from hotset.server.app import create_app

    where = f"http://{_printable(listener)}"
    failures: list[HotsetError] = []

    def on_ready(service: "EngineService") -> None:
        click.echo(f"{service.report}\nserving {service.model.name} at {where}/v1", err=True)

    def on_failure(error: HotsetError) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(config, on_ready=on_ready, on_failure=on_failure)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", lifespan="on", timeout_graceful_shutdown=_SHUTDOWN_S
        )
    )
    click.echo(f"listening at {where}; loading the model", err=True)
    with listener:
        server.run(sockets=[listener])
    if failures:
        raise failures[0]
    if not server.started:
        sys.exit(1)  # it has said why


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1024)
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
