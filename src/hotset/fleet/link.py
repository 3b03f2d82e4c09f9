"""A connection between a front and a replica: proof of the secret, frames, beats.

A frame is 4 bytes of length, the highest first, and that number of bytes. Both sides prove that
they have the fleet secret before either says anything else: what comes before is random numbers
and what only the secret's holder can compute from them.

Without TLS whoever is on the way can read and change what follows.

Imports no torch.
"""

import asyncio
import hmac
import logging
import secrets
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from hotset.fleet.wire import MOST_BYTES

_log = logging.getLogger(__name__)

T = TypeVar("T")

HANDSHAKE_S = 5.0  # most that connecting, proofs and greetings may take
BEAT_S = 1.0
MOST_SILENT_BEATS = 5
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_LENGTH_BYTES = 4
_READ_BYTES = 2**18


class LinkError(Exception):
    """A link that cannot be opened or goes on no more; one line."""


def _proof(secret: bytes, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, b"hotset link " + side + b"\0" + first + second, "sha256")


async def prove_replica(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> None:
    """The replica's side of the proofs; the front's comes first, so that others learn nothing.

    Raises:
        LinkError: the front has another secret, or none.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    writer.write(nonce)
    theirs = await _exactly(reader, _NONCE_BYTES)
    proof = await _exactly(reader, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(secret, b"front", nonce, theirs)):
        raise LinkError("the other side has another fleet secret, or none")
    writer.write(_proof(secret, b"replica", nonce, theirs))


async def prove_front(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> None:
    """The front's side of the proofs.

    Raises:
        LinkError: the replica has another secret, or none.
    """
    theirs = await _exactly(reader, _NONCE_BYTES)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    writer.write(nonce + _proof(secret, b"front", theirs, nonce))
    try:
        proof = await _exactly(reader, _PROOF_BYTES)
    except LinkError:
        raise LinkError("it takes no proof of ours; is the fleet secret the same there?") from None
    if not hmac.compare_digest(proof, _proof(secret, b"replica", theirs, nonce)):
        raise LinkError("it has another fleet secret, or none")


async def _exactly(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
    try:
        return await reader.readexactly(num_bytes)
    except (asyncio.IncompleteReadError, OSError):
        raise LinkError("the other side has closed the connection") from None


class Link:
    """Frames over a connection; used in one event loop.

    Args:
        reader: of the connection, likewise `writer`.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._num_written = 0
        self._silent_beats = 0  # ended since bytes came
        self._stuck_beats = 0  # ended since bytes left, while some wait

    def send(self, payload: bytes) -> None:
        """Write a frame. Does not wait; `drained` does."""
        if len(payload) > MOST_BYTES:
            raise LinkError(f"a message has {len(payload)} bytes; a link takes {MOST_BYTES}")
        self._num_written += _LENGTH_BYTES + len(payload)
        self._writer.writelines((len(payload).to_bytes(_LENGTH_BYTES, "big"), payload))

    async def drained(self) -> None:
        """Wait until the other side has taken most of what was sent. Raises LinkError."""
        try:
            await self._writer.drain()
        except OSError:
            raise LinkError("the other side has closed the connection") from None

    async def receive(self, most_bytes: int) -> bytes:
        """The next frame, which is no beat; for greetings, before `run`. Raises LinkError."""
        length = int.from_bytes(await _exactly(self._reader, _LENGTH_BYTES), "big")
        _check_length(length, most_bytes)
        return await _exactly(self._reader, length)

    async def run(self, on_frame: Callable[[bytes], None]) -> None:
        """Receive, and beat, until the link ends.

        Args:
            on_frame: gets each frame; what it raises ends the link.

        Raises:
            LinkError: the link has ended, and why.
        """
        await together(self._beat(), self._receive(on_frame))

    def close(self) -> None:
        """Close the connection; what was sent may still arrive. Idempotent."""
        self._writer.close()

    def abort(self) -> None:
        """Close the connection at once. Idempotent."""
        self._writer.transport.abort()

    async def _receive(self, on_frame: Callable[[bytes], None]) -> None:
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
                end = start + _LENGTH_BYTES + length
                if len(buffer) < end:
                    break
                if length:  # or it is a beat
                    on_frame(bytes(buffer[start + _LENGTH_BYTES : end]))
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
                raise LinkError(f"the other side has {what} nothing for {seconds:g} s")
            if not waiting:
                self.send(b"")


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run them at once until one raises; the others are cancelled then."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _check_length(length: int, most_bytes: int) -> None:
    if length > most_bytes:
        raise LinkError(f"a frame has {length} bytes; expected at most {most_bytes}")


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
    """Whoever connects may make a TLS handshake fail, which is worth no more."""
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
