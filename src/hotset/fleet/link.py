"""An open connection between a front and a replica: frames and beats.

A frame is 4 bytes of length, the highest first, the message, and 16 bytes that only who has the
key can make of the message and its place in the connection. A beat is an empty message.

Without TLS a machine on the way can read messages, and change none.

Imports no torch.
"""

import asyncio
import contextlib
import hmac
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from hotset.fleet.proof import Keys, LinkError, exactly
from hotset.fleet.wire import MOST_BYTES

_log = logging.getLogger(__name__)

T = TypeVar("T")

HANDSHAKE_S = 5.0  # most that connecting, proofs and greetings may take
BEAT_S = 1.0
MOST_SILENT_BEATS = 5
_LENGTH_BYTES = 4
_TAG_BYTES = 16
_READ_BYTES = 2**18
# Of <linux/tcp.h>; the second since Linux 6.15.
_TCP_THIN_LINEAR_TIMEOUTS, _TCP_RTO_MAX_MS = 16, 44


class SilentError(LinkError):
    """The other side has sent, or taken, nothing for a while."""


class Link:
    """Frames over a connection; used in one event loop.

    Args:
        reader: of the connection, likewise `writer`.
        keys: which both sides have proved.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keys: Keys
    ) -> None:
        self._reader, self._writer = reader, writer
        self._outgoing, self._incoming = _Tags(keys.ours), _Tags(keys.theirs)
        self._num_written = 0
        self._silent_beats = 0  # ended since bytes came
        self._stuck_beats = 0  # ended since bytes left, while some wait
        _send_again_soon(writer)

    def send(self, message: bytes) -> None:
        """Write a frame. Does not wait; `drained` does. Raises LinkError where it is too big."""
        _check_length(len(message), MOST_BYTES)
        length = len(message).to_bytes(_LENGTH_BYTES, "big")
        self._num_written += _LENGTH_BYTES + len(message) + _TAG_BYTES
        self._writer.writelines((length, message, self._outgoing.next(message)))

    async def drained(self) -> None:
        """Wait until the other side has taken most of what was sent. Raises LinkError."""
        try:
            await self._writer.drain()
        except OSError:
            raise LinkError("the other side has closed the connection") from None

    async def receive(self, most_bytes: int) -> bytes:
        """The next message; for greetings, before `run`. Raises LinkError."""
        length = int.from_bytes(await exactly(self._reader, _LENGTH_BYTES), "big")
        _check_length(length, most_bytes)
        return self._incoming.checked(await exactly(self._reader, length + _TAG_BYTES))

    async def run(self, on_message: Callable[[bytes], None]) -> None:
        """Receive, and beat, until the link ends.

        Args:
            on_message: gets each message but beats; what it raises ends the link.

        Raises:
            LinkError: the link has ended, and why; SilentError where the other side is silent.
        """
        await together(self._beat(), self._receive(on_message))

    def close(self) -> None:
        """Close the connection; what was sent may still arrive. Idempotent."""
        self._writer.close()

    def abort(self) -> None:
        """Close the connection at once. Idempotent."""
        self._writer.transport.abort()

    async def _receive(self, on_message: Callable[[bytes], None]) -> None:
        buffer = bytearray()
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
            except OSError:
                data = b""
            if not data:
                raise LinkError("the other side has closed the connection")
            self._silent_beats = 0
            buffer += data
            start = 0
            while len(buffer) - start >= _LENGTH_BYTES:
                length = int.from_bytes(buffer[start : start + _LENGTH_BYTES], "big")
                _check_length(length, MOST_BYTES)
                end = start + _LENGTH_BYTES + length + _TAG_BYTES
                if len(buffer) < end:
                    break
                message = self._incoming.checked(bytes(buffer[start + _LENGTH_BYTES : end]))
                if message:
                    on_message(message)
                start = end
            del buffer[:start]

    async def _beat(self) -> None:
        """Tell the other side that this one lives, and see whether that one does.

        Beats are counted, not seconds: a process that was itself stopped for long has counted one.
        """
        num_left = 0  # bytes that the system has taken, by the last beat
        while True:
            await asyncio.sleep(BEAT_S)
            self._silent_beats += 1
            waiting = self._writer.transport.get_write_buffer_size()
            left = self._num_written - waiting
            self._stuck_beats = self._stuck_beats + 1 if waiting and left <= num_left else 0
            num_left = left
            if max(self._silent_beats, self._stuck_beats) > MOST_SILENT_BEATS:
                seconds = MOST_SILENT_BEATS * BEAT_S
                what = "sent" if self._silent_beats > MOST_SILENT_BEATS else "taken"
                raise SilentError(f"the other side has {what} nothing for {seconds:g} s")
            if not waiting:
                self.send(b"")


def _send_again_soon(writer: asyncio.StreamWriter) -> None:
    """Have what was lost sent again each second at most, where the system can.

    Waits that double, as TCP has them, would make 6 s of silence out of 3 s without a network.
    """
    connection = writer.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    for option, value in ((_TCP_THIN_LINEAR_TIMEOUTS, 1), (_TCP_RTO_MAX_MS, 1000)):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run them at once until one raises; the others are cancelled then."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _Tags:
    """Makes and checks what ends the frames of one direction."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def next(self, message: bytes) -> bytes:
        """The tag of the next message."""
        self._number += 1
        numbered = self._number.to_bytes(8, "big") + message
        return hmac.digest(self._key, numbered, "sha256")[:_TAG_BYTES]

    def checked(self, data: bytes) -> bytes:
        """The message of the next frame, without its tag. Raises LinkError."""
        message = data[:-_TAG_BYTES]
        if not hmac.compare_digest(data[-_TAG_BYTES:], self.next(message)):
            raise LinkError("a message was changed on its way")
        return message


def _check_length(length: int, most_bytes: int) -> None:
    if length > most_bytes:
        raise LinkError(f"a message has {length} bytes; expected at most {most_bytes}")


class LinkThread:
    """The event loop of all links of a process, in a thread of its own."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._loop.set_exception_handler(_log_in_a_line)
        self._thread = threading.Thread(target=self._run, name="hotset-links", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in it."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Have it called there soon."""
        self._loop.call_soon_threadsafe(function, *args)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and return what it does; from any other thread."""
        if self.is_current:
            coroutine.close()
            raise RuntimeError("the thread of links cannot wait for itself")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


def _log_in_a_line(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Any client may make a TLS handshake fail, which is worth no more than a line."""
    error = context.get("exception")
    _log.warning("a connection has failed: %s: %s", context["message"], error)


_threads: list[LinkThread] = []
_lock = threading.Lock()


def link_thread() -> LinkThread:
    """That of this process; the first call starts it."""
    with _lock:
        if not _threads:
            _threads.append(LinkThread())
        return _threads[0]
