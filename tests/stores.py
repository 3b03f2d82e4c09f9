"""Stores for the tests of the remote tier: a real one, and one that does as it is told."""

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hotset.memory.remote.resp import Address
from hotset.memory.remote.seal import Seal
from hotset.memory.remote.shared import SharedTier
from hotset.memory.remote.tier import RemoteTier
from hotset.memory.tier import Answer, Completion, CompletionStatus

_BOUND = ["--save", "", "--maxmemory-policy", "allkeys-lru", "--maxmemory"]

SECRET = b"a secret of the fleet"
PAYLOAD_BYTES = 8192

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed"
)


@contextmanager
def redis_server(*more: str, maxmemory: str = "64mb") -> Iterator[str]:
    """A real server on a Unix socket, which keeps nothing; yields its URL."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        server = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", path, *_BOUND, maxmemory, *more],
            stdout=subprocess.DEVNULL,
        )
        try:
            until(lambda: takes_connections(path))
            yield f"unix://{path}"
        finally:
            server.kill()
            server.wait()


def takes_connections(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as tried, suppress(OSError):
        tried.connect(str(path))
        return True
    return False


class FakeStore:
    """A server of the Redis protocol on a Unix socket, with a dictionary of values.

    A function of `replies`, by the name of a command, takes the words after it in place of what is
    stored, and returns bytes to send. Returning None says nothing; raising OSError ends the
    connection.
    """

    def __init__(self, folder: Path, *, password: bytes | None = None) -> None:
        self.values: dict[bytes, bytes] = {}
        self.replies: dict[bytes, Callable[..., bytes | None]] = {}
        self.asked: list[bytes] = []
        self.password = password
        self.max_memory = 1 << 30
        self.url = f"unix://{folder / 'fake'}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "fake"))
        self._listener.listen()
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        for one in [self._listener, *self._connections]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(2.0)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        file, is_in = connection.makefile("rb"), self.password is None
        try:
            while head := file.readline():
                words = []
                for _ in range(int(head[1:])):
                    length = int(file.readline()[1:])
                    words.append(file.read(length + 2)[:-2])
                name, rest = words[0].upper(), words[1:]
                self.asked.append(name)
                if name == b"AUTH":
                    is_in = rest[-1] == self.password
                    reply: bytes | None = b"+OK\r\n" if is_in else b"-WRONGPASS\r\n"
                elif not is_in:
                    reply = b"-NOAUTH\r\n"
                else:
                    reply = self.replies.get(name, getattr(self, f"_{name.decode().lower()}"))(
                        *rest
                    )
                if reply is not None:
                    connection.sendall(reply)
        except (OSError, ValueError):
            pass
        finally:
            file.close()
            connection.close()

    def _ping(self) -> bytes:
        return b"+PONG\r\n"

    def _info(self, section: bytes) -> bytes:
        return bulk(b"used_memory:1\r\nmaxmemory:%d\r\n" % self.max_memory)

    def _smembers(self, name: bytes) -> bytes:
        return b"*0\r\n"

    def _strlen(self, name: bytes) -> bytes:
        return b":%d\r\n" % len(self.values.get(name, b""))

    def _get(self, name: bytes) -> bytes:
        return bulk(self.values[name]) if name in self.values else b"$-1\r\n"

    def _set(self, name: bytes, value: bytes, *how: bytes) -> bytes:
        if b"NX" in how and name in self.values:
            return b"$-1\r\n"
        self.values[name] = value
        return b"+OK\r\n"

    def _del(self, *names: bytes) -> bytes:
        return b":%d\r\n" % sum(self.values.pop(name, None) is not None for name in names)


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def seal(
    secret: bytes = SECRET, fingerprint: str = "model", writer: str = "writer", **given: Any
) -> Seal:
    return Seal(secret, fingerprint, writer, **given)


def remote(*urls: str, by: Seal | None = None, **given: Any) -> RemoteTier:
    addresses = [Address.of(url) for url in urls]
    return RemoteTier(addresses, by or seal(), payload_bytes=PAYLOAD_BYTES, **given)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int) -> bytearray:
    return bytearray(number.to_bytes(8, "big") * (PAYLOAD_BYTES // 8))


def ended(tier: SharedTier, transfer_id: int, timeout_s: float = 5.0) -> Completion:
    """How a transfer ends at last."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        tier.wait(0.05)
        for completion in tier.poll():
            is_over = completion.status is not CompletionStatus.LATE
            if is_over and completion.transfer_id == transfer_id:
                return completion
    raise AssertionError("a transfer does not end")


def write(tier: RemoteTier, number: int) -> Completion:
    transfer_id = tier.submit_write(key(number), memoryview(content(number)), must=True)
    assert transfer_id is not None
    return ended(tier, transfer_id)


def read(tier: SharedTier, number: int) -> tuple[Completion, bytearray]:
    into = bytearray(PAYLOAD_BYTES)
    return ended(tier, tier.submit_read(key(number), memoryview(into))), into


def answer(tier: SharedTier, number: int) -> Answer:
    """What a tier says of a key once it knows."""
    while (found := tier.lookup([key(number)])[0]) is Answer.PENDING:
        tier.wait(0.05)
        tier.poll()
    return found


def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for what a thread does."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end_s, "it does not come"
        time.sleep(0.002)
