"""One server's answers, streamed over HTTP/1.1 and kept raw: bytes, and when they came.

Nothing is parsed while requests run but HTTP's own framing, in C: what the events hold is read
after the run (`events`), so that the client's work is not in the figures.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from hotset.errors import ConfigError

_CONNECT_S = 30.0
_SILENCE_S = 600.0  # a request may wait so long for its next token


class BrokenStreamError(Exception):
    """An answer that did not come to its end; the message says how."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go; plain data, for other processes.

    Attributes:
        headers: of each request, ending with an empty line.
    """

    host: str
    port: int
    is_tls: bool
    path: str
    headers: bytes

    @classmethod
    def of(cls, url: str, key: str | None) -> "Endpoint":
        """That of a URL. Raises ConfigError: it is none of HTTP."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of HTTP; expected http://HOST:PORT")
        is_tls = parts.scheme == "https"
        path = parts.path or "/"
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]
        try:
            headers = "\r\n".join(lines).encode("ascii")
        except UnicodeEncodeError as error:
            raise ConfigError("the URL or the API key is not ASCII") from error
        if any(character < 32 for line in lines for character in line.encode()):
            raise ConfigError("the URL or the API key has a line break in it")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, path, headers)


@dataclass(slots=True)
class RawAnswer:
    """What came back for one request. Times are of `time.perf_counter`.

    Attributes:
        chunks: of the body, in order, each with the time at which it came.
    """

    status: int = 0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    end_s: float = 0.0

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(chunk for _, chunk in self.chunks)

    @property
    def num_bytes(self) -> int:
        """Of the body."""
        return sum(len(chunk) for _, chunk in self.chunks)


class _Connection(asyncio.Protocol):
    """One request after the other over one connection; the parser calls its `on_` methods."""

    def __init__(self) -> None:
        self.is_open = True
        self._parser: httptools.HttpResponseParser | None = None
        self._answer = RawAnswer()
        self._done: asyncio.Future[None] | None = None
        self._now_s = self._sent_s = 0.0
        self._timer: asyncio.TimerHandle
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of classes of its own

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        if self._parser is None:  # nothing was asked for yet
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")

    def eof_received(self) -> None:
        self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(exc)

    def on_body(self, body: bytes) -> None:
        self._answer.chunks.append((self._now_s, body))

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self._answer.status = self._parser.get_status_code()
        self._answer.end_s = self._now_s
        keeps = self._parser.should_keep_alive()
        self._parser = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
        if not keeps:
            self.close()

    async def post(self, request: bytes) -> RawAnswer:
        """Send a request and wait for the end of its answer. Raises BrokenStreamError."""
        assert self._transport is not None
        self._answer = RawAnswer()
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._sent_s = time.perf_counter()
        self._transport.write(request)
        self._look_at_silence()
        try:
            await self._done
        except BaseException:
            self.close()  # its answer may still be under way
            raise
        finally:
            self._timer.cancel()
        return self._answer

    def _look_at_silence(self) -> None:
        silent_s = time.perf_counter() - max(self._now_s, self._sent_s)
        if silent_s >= _SILENCE_S:
            self._fail(f"nothing has come for {_SILENCE_S:.0f} s")
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.1, _SILENCE_S - silent_s), self._look_at_silence)

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def _lost(self, error: Exception | None = None) -> None:
        self.is_open = False
        if self._parser is None:
            return
        if self._answer.chunks and b"[DONE]" in self._answer.chunks[-1][1]:
            self.on_message_complete()  # an answer without a length ends with its connection
            return
        num_bytes = self._answer.num_bytes
        reason = f" ({error})" if error else ""
        self._fail(f"the server closed the connection after {num_bytes} bytes of answer{reason}")

    def _fail(self, message: str) -> None:
        self._parser = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(BrokenStreamError(message))
        self.close()

    @property
    def has_begun(self) -> bool:
        """Whether something of the answer has come."""
        return bool(self._answer.chunks) or self._now_s > 0


class Client:
    """Sends requests to one endpoint from one event loop; connections are used again."""

    def __init__(self, endpoint: Endpoint, *, make_tls: Callable[[], ssl.SSLContext]) -> None:
        self._endpoint = endpoint
        self._tls = make_tls() if endpoint.is_tls else None
        self._idle: list[_Connection] = []

    async def post(self, body: bytes) -> RawAnswer:
        """The whole answer to a request with a JSON body.

        Raises:
            BrokenStreamError: it did not come to its end, or the server cannot be reached.
        """
        head = self._endpoint.headers
        request = b"%b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            connection._now_s = 0.0
            try:
                return await self._post(connection, request)
            except BrokenStreamError:
                if connection.has_begun:
                    raise
                # The server had closed it meanwhile, as it may with one that idles.
        return await self._post(await self._connect(), request)

    async def _post(self, connection: _Connection, request: bytes) -> RawAnswer:
        answer = await connection.post(request)
        if connection.is_open:
            self._idle.append(connection)
        return answer

    async def _connect(self) -> _Connection:
        endpoint = self._endpoint
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await loop.create_connection(
                    _Connection,
                    endpoint.host,
                    endpoint.port,
                    ssl=self._tls,
                    server_hostname=endpoint.host if self._tls else None,
                )
        except (OSError, TimeoutError) as error:  # ssl's errors too
            reason = str(error) or "no answer"
            raise BrokenStreamError(f"the server cannot be reached: {reason}") from error
        return connection

    def close(self) -> None:
        """Close the connections that idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
