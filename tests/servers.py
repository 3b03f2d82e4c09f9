"""A real server over a tiny model, on a port of its own."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import openai
import uvicorn
from starlette.types import ASGIApp
from tiny_engine import build

from hotset.engine.service import EngineService
from hotset.engine.stream_service import StreamService
from hotset.options import Options
from hotset.server.app import Api, ServerConfig

KEY = "sk-alice-0123456789"
CHAT = {"messages": [{"role": "user", "content": "the cat"}], "temperature": 0, "max_tokens": 6}


@dataclass
class RunningServer:
    """What tests need of a server that runs in a thread."""

    port: int
    api: Api
    service: StreamService
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)


@contextlib.contextmanager
def running_server(
    config: Options | None = None,
    server_config: ServerConfig | None = None,
    *,
    drain_s: int = 1,
    start: Callable[[], StreamService] | None = None,
    own_process: bool = False,
    context: int = 512,
    family: str = "llama",
    entry: Callable[[Api], ASGIApp] = lambda api: api,
    listener: socket.socket | None = None,
) -> Iterator[RunningServer]:
    """Serve what `start` returns until the block ends; None is an engine over a tiny model.

    `entry` makes of the Api what answers, at `listener` or a port of its own.
    """
    ready: Future[StreamService] = Future()
    start = start or partial(
        EngineService,
        config or Options.of(hot_gib=0.01),
        build=partial(build, context=context, family=family),
        own_process=own_process,
    )
    api = Api(
        start,
        server_config or ServerConfig(),
        on_ready=ready.set_result,
        on_failure=ready.set_exception,
    )
    listener = listener or socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(
        uvicorn.Config(
            entry(api),
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=drain_s,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()

    def stop() -> None:
        api.drain()
        server.should_exit = True
        thread.join(60)

    try:
        service = ready.result(60)
        name = listener.getsockname()
        yield RunningServer(0 if isinstance(name, str) else name[1], api, service, stop)
    finally:
        stop()
        listener.close()


def wait_for(condition: Callable[[], Any]) -> None:
    """Until it is true, a while at most."""
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")
