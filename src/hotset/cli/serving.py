"""Runs the server that `hotset serve` was asked for: its socket, its signals and what it says."""

import asyncio
import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import uvicorn
from starlette.types import ASGIApp

from hotset.cli.server_flags import OpenServer
from hotset.engine.stream_service import StreamService
from hotset.errors import EngineError, HotsetError
from hotset.ranks.torchrun import place
from hotset.server.app import Api
from hotset.text.prompt import PromptEncoder

_KEEP_ALIVE_S = 75  # longer than the usual proxy keeps its own connections
_CUT_OFF_S = 5


def dry_run(start: Callable[[], StreamService], where: str) -> None:
    """Set everything up, print what went where, and give it all back."""
    with contextlib.closing(start()) as service:
        _warn_of_no_template(service)
        click.echo(f"{service.report}\nwould serve {service.model.name} at {where}/v1")


def serve(
    start: Callable[[], StreamService],
    opened: OpenServer,
    drain_s: int,
    until: str = "loading the model",
    entry: Callable[[Api], ASGIApp] = lambda api: api,
    certificate: tuple[Path, Path | None] | None = None,
    is_desk: bool = False,
) -> None:
    """Serve what `start` returns until a signal ends it.

    Args:
        start: takes a while, in which `until` says what it does.
        opened: where, and for whom.
        drain_s: how long requests may go on after the signal.
        until: see `start`.
        entry: makes of the Api what answers.
        certificate: for TLS: files of the chain and of the key, which may be in the former.
        is_desk: fronts come to it, not users.

    Raises:
        HotsetError: of `start`. SystemExit: the server cannot start.
    """
    failures: list[HotsetError] = []
    where = opened.where

    def on_ready(service: StreamService) -> None:
        if place() is not None:
            server.watched = service
        _warn_of_no_template(service)
        if is_desk:
            click.echo(f"files and batches at {where}", err=True)
            return
        click.echo(f"{service.report}\nserving {service.model.name} at {where}/v1", err=True)
        click.echo(f"status page {where}/, API {where}/docs, metrics {where}/metrics", err=True)

    def on_failure(error: HotsetError) -> None:
        failures.append(error)
        server.should_exit = True

    api = Api(start, opened.config, on_ready=on_ready, on_failure=on_failure)
    server = _Server(api, where, drain_s, until, entry(api), certificate, on_failure)
    _raise_file_limit()
    server.run(sockets=[opened.listener])
    if failures:
        raise failures[0]
    if not server.started:
        sys.exit(1)  # it has said why


class _Server(uvicorn.Server):
    """Takes no more requests after the first signal; a second one ends those that run.

    Attributes:
        watched: whose end is the server's too, as torchrun starts all ranks again; None for none.
    """

    watched: StreamService | None = None

    def __init__(
        self,
        api: Api,
        where: str,
        drain_s: int,
        until: str,
        entry: ASGIApp,
        certificate: tuple[Path, Path | None] | None,
        on_failure: Callable[[HotsetError], None],
    ) -> None:
        chain, key = certificate or (None, None)
        super().__init__(
            uvicorn.Config(
                entry,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                ssl_certfile=chain,
                ssl_keyfile=key,
                # For connections whose client reads nothing: requests are ended before.
                timeout_graceful_shutdown=drain_s + _CUT_OFF_S,
            )
        )
        self._api = api
        self._where, self._until = where, until
        self._drain_s = drain_s
        self._on_failure = on_failure
        self._is_urgent = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """See uvicorn."""
        if not self._api.is_loaded:  # nothing runs, and a thread that loads cannot be stopped
            click.echo("interrupted", err=True)
            os._exit(128 + sig)
        if not self.should_exit:
            self._api.drain()
            open_requests = self._api.gate.counts.open
            click.echo(f"stopping; {open_requests} requests have {self._drain_s} s", err=True)
        elif not self._is_urgent:
            self._is_urgent = True
            return
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn: ten times a second."""
        if self.watched is not None and not self.should_exit:
            try:
                self.watched.raise_unless_healthy()
            except EngineError as error:
                self._on_failure(error)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn. From here on signals come to `handle_exit`."""
        click.echo(f"listening at {self._where}; {self._until}", err=True)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        ending = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_requests(self) -> None:
        """End what runs after `drain_s`, or at a second signal."""
        end_s = time.monotonic() + self._drain_s
        while time.monotonic() < end_s and not self._is_urgent:
            await asyncio.sleep(0.1)
        await self._api.end_requests()


def _warn_of_no_template(service: StreamService) -> None:
    message = PromptEncoder(service.model).no_template
    if message is not None:
        click.echo(f"warning: {message}; chats are answered with 400", err=True)


def _raise_file_limit() -> None:
    """A connection is an open file, and 1,024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
