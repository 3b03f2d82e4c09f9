"""Answers the peer tiers of other replicas out of host memory. Imports no torch."""

import contextlib
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hotset.errors import ConfigError
from hotset.memory.remote.resp import Address
from hotset.memory.remote.seal import HEADER_BYTES, KEY_BYTES, Seal

_MOST_CONNECTIONS = 256
_MOST_WORDS, _MOST_WORD = 4, 1024
_LOGIN_S = 5.0
_SEND_TIMEOUT = struct.pack("ll", 5, 0)  # seconds and microseconds
_PAUSE = 3.0  # times as long as it takes to copy and seal a payload, nothing is
_BACKLOG = 64

CopyOut = Callable[[bytes, memoryview], bool]
"""Copies the payload of a key into memory, from any thread; False where there is none."""


class PeerServer:
    """Speaks as much of the Redis protocol as a peer tier does: AUTH, PING, STRLEN and GET.

    Payloads leave sealed, under names that only those with the secret can make; who does not have
    it is not let in, and could read nothing. One payload is copied and sealed at a time, and then
    there is a pause of three times as long: at most a quarter of a core's time goes to peers.

    Args:
        url: where to listen, as peers are told.
        seal: seals payloads; its password is asked for.
        payload_bytes: of one.
        has: whether the payload of a key is there; called from any thread.
        copy_out: copies it.
        is_busy: whether this replica's own fetches wait; peers get nothing meanwhile.

    Raises:
        ConfigError: nobody can listen there.
    """

    def __init__(
        self,
        url: str,
        seal: Seal,
        *,
        payload_bytes: int,
        has: Callable[[bytes], bool],
        copy_out: CopyOut,
        is_busy: Callable[[], bool],
    ) -> None:
        self.url = url
        self.sent_bytes = 0
        self._seal, self._payload_bytes = seal, payload_bytes
        self._has, self._copy_out, self._is_busy = has, copy_out, is_busy
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()  # by _lock
        self._is_closed = False
        address = Address.of(url)
        self._path = None if address.path is None else Path(address.path)
        try:
            self._listener = self._listen(address)
        except OSError as error:
            raise ConfigError(
                f"peer_url is {url}, where nobody can listen: {error.strerror or error}; give "
                "another address"
            ) from error
        threading.Thread(target=self._accept, name="peer-accept", daemon=True).start()

    def _listen(self, address: Address) -> socket.socket:
        if self._path is None:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            return socket.create_server(
                (address.host, address.port), family=family, backlog=_BACKLOG
            )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                if self._path.is_socket():  # of a process that was killed
                    self._path.unlink()
            old_mask = os.umask(0o177)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(old_mask)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def close(self) -> None:
        """Listen no more, and end all connections."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        for one in (self._listener, *connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    # In threads

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(0.1)  # out of file descriptors
                continue
            with self._lock:
                is_taken = not self._is_closed and len(self._connections) < _MOST_CONNECTIONS
                if is_taken:
                    self._connections.add(connection)
            if not is_taken:
                connection.close()
                continue
            threading.Thread(
                target=self._serve, args=(connection,), name="peer", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                connection.settimeout(_LOGIN_S)
                if not self._log_in(connection, lines):
                    return
                connection.settimeout(None)  # it may be silent for as long as it likes
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
                value = bytearray(HEADER_BYTES + 2 * self._payload_bytes)
                while (words := _words(lines)) is not None:
                    self._answer(connection, words, memoryview(value))
        except (OSError, ValueError):
            pass  # what it says is no command, or it is gone
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _log_in(self, connection: socket.socket, lines: BinaryIO) -> bool:
        words = _words(lines) or []
        expected = [b"AUTH", self._seal.password().encode()]
        is_in = len(words) == 2 and all(map(hmac.compare_digest, words, expected))
        connection.sendall(b"+OK\r\n" if is_in else b"-WRONGPASS another secret or model\r\n")
        return is_in

    def _answer(self, connection: socket.socket, words: list[bytes], value: memoryview) -> None:
        name, *rest = words
        if name == b"PING":
            connection.sendall(b"+PONG\r\n")
        elif name in (b"STRLEN", b"GET") and len(rest) == 1 and len(rest[0]) == KEY_BYTES:
            [key] = self._seal.keys(rest)
            if name == b"STRLEN":
                length = HEADER_BYTES + self._payload_bytes if self._has(key) else 0
                connection.sendall(b":%d\r\n" % length)
            else:
                self._send(connection, key, value)
        else:
            connection.sendall(b"-ERR no such command\r\n")

    def _send(self, connection: socket.socket, key: bytes, value: memoryview) -> None:
        if self._is_busy():
            connection.sendall(b"$-1\r\n")
            return
        end = HEADER_BYTES + self._payload_bytes
        payload, scratch = value[HEADER_BYTES:end], value[end:]
        with self._turn:
            start_s = time.monotonic()
            is_there = self._copy_out(key, payload)
            if is_there:
                header, sealed = self._seal.seal(key, payload, scratch)
                time.sleep(_PAUSE * (time.monotonic() - start_s))
        if not is_there:
            connection.sendall(b"$-1\r\n")
            return
        connection.sendall(b"$%d\r\n%b" % (end, header))
        connection.sendall(sealed)
        connection.sendall(b"\r\n")
        self.sent_bytes += self._payload_bytes


def _words(lines: BinaryIO) -> list[bytes] | None:
    """The next command; None at the end. Raises ValueError: it is none, or too long."""
    head = lines.readline(_MOST_WORD)
    if not head:
        return None
    words = []
    for _ in range(_number(head, b"*", _MOST_WORDS)):
        length = _number(lines.readline(_MOST_WORD), b"$", _MOST_WORD)
        words.append(lines.read(length + 2)[:-2])
    return words


def _number(line: bytes, kind: bytes, most: int) -> int:
    number = int(line[1:]) if line[:1] == kind else -1
    if not 0 <= number <= most:
        raise ValueError(line)
    return number
