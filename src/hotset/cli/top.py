"""`hotset top`: what a running server does, in a terminal."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

import click

from hotset.cli.options import Command
from hotset.errors import ConfigError
from hotset.foreign_text import parse_json

Json = dict[str, Any]

_TIMEOUT_S = 10.0


@click.command(cls=Command)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Of the server.")
@click.option("--api-key", envvar="HOTSET_API_KEY", help="One of the server's keys, if it has any.")
@click.option("--every-s", type=click.FloatRange(0.2), default=1.0, show_default=True)
@click.option("--once", is_flag=True, help="Print it once and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print it once as one JSON object.")
def command(url: str, api_key: str | None, every_s: float, once: bool, as_json: bool) -> None:
    r"""Show users, tokens, latencies and the memory map of `hotset serve` or `hotset fleet`.

    Of a fleet it shows each replica too.

    \b
    Example:
      hotset top --url http://127.0.0.1:8000
    """
    status = fetch(url, api_key)
    if as_json:
        click.echo(json.dumps(status))
        return

    from rich.console import Console
    from rich.live import Live

    from hotset.cli.top_view import failed, view

    console = Console()
    if once:
        console.print(view(status, console.width))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown = view(fetch(url, api_key), console.width, console.height)
            except ConfigError as error:  # it may come back
                shown = failed(str(error))
            live.update(shown, refresh=True)
            time.sleep(every_s)


def fetch(url: str, api_key: str | None) -> Json:
    """Ask a server for its status. Raises ConfigError: it does not answer, or not with one."""
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/status.json")
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            status: Json = parse_json(response.read())
        if "engine" not in status:
            raise ValueError("no status of hotset")
    except urllib.error.HTTPError as error:
        with error:
            hint = "; give --api-key" if error.code == 401 else ""
            raise ConfigError(f"{url} answers {error.code}: {_message(error)}{hint}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"{url} cannot be reached: {reason}; is hotset serve running?") from error
    except ValueError as error:
        raise ConfigError(f"{url} is no hotset server: {error}") from error
    return status


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(parse_json(error.read())["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return str(error.reason)
