"""A client of the Redis protocol for large values, which come straight into the caller's memory.

Source: the protocol RESP2, https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from hotset.errors import ConfigError

_LINE_BYTES = 16 * 1024
_MOST_TEXT = 1 << 20  # bytes of a reply that is no payload
_MOST_ITEMS = 1 << 16
_EXPECTED = "expected redis://[user:password@]host:port[/database] or unix:///path[?password=...]"

Reply = bytes | int | None | list["Reply"]


class StoreError(Exception):
    """A store did not do what it was asked to; its connection is of no further use.

    Attributes:
        fault: the kind of fault, as counted.
    """

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class RefusedError(Exception):
    """The store answered with an error; the connection goes on."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store listens, and who asks.

    Attributes:
        name: host and port, or path: without user and password, to be shown.
        path: of a Unix socket; None where it is `host` and `port`.
    """

    name: str
    host: str = ""
    port: int = 0
    path: str | None = None
    user: str | None = None
    password: str | None = None
    database: int = 0

    @classmethod
    def of(cls, url: str) -> "Address":
        """The address that a URL says.

        Raises:
            ConfigError: it is none of a store; the message does not show a password.
        """
        try:
            parts = urlsplit(url)
            port = 6379 if parts.port is None else parts.port
            asked = parse_qs(parts.query, strict_parsing=bool(parts.query))
            password = parts.password or asked.pop("password", [None])[0]
            database = int(
                asked.pop("db", ["0"])[0] if parts.scheme == "unix" else parts.path[1:] or 0
            )
        except ValueError as error:
            raise ConfigError(
                f"the URL of a store cannot be read ({error}); {_EXPECTED}"
            ) from error
        is_path = parts.scheme == "unix" and parts.path and not parts.netloc.rpartition("@")[2]
        is_host = parts.scheme == "redis" and parts.hostname
        if asked or not (is_path or is_host):
            shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            raise ConfigError(f"{shown!r} is no URL of a store; {_EXPECTED}")
        user = unquote(parts.username) if parts.username else None
        password = unquote(password) if password and parts.password else password
        if is_path:
            return cls(parts.path, "", 0, parts.path, user, password, database)
        host = parts.hostname or ""
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return cls(shown, host, port, None, user, password, database)


def command(*words: bytes | str | int) -> bytes:
    """A command as it goes over the wire."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def set_command(name: bytes, num_bytes: int, expiry_ms: int) -> tuple[bytes, bytes]:
    """What goes before and after a value of `num_bytes` to set it."""
    head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, num_bytes)
    expiry = b"%d" % expiry_ms
    return head, b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(expiry), expiry)


class Connection:
    """One connection, logged in. Of one thread; every call ends by `deadline_s`.

    After a StoreError it is to be closed: replies cannot be skipped.

    Args:
        address: of the store.
        deadline_s: by `time.monotonic`, for what comes next; set it before each batch.

    Raises:
        StoreError: the store cannot be reached (`down`, `late`) or refuses the login (`login`).
    """

    def __init__(self, address: Address, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._buffer = bytearray(_LINE_BYTES)
        self._start = self._end = 0  # of what was received and not read
        try:
            self._socket = self._open(address)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._log_in(address)
        except BaseException:
            self.close()
            raise

    def _open(self, address: Address) -> socket.socket:
        if address.path is None:
            place = (address.host, address.port)
            opened = socket.create_connection(place, timeout=self._left_s())
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return opened
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            opened.settimeout(self._left_s())
            opened.connect(address.path)
        except BaseException:
            opened.close()
            raise
        return opened

    def _log_in(self, address: Address) -> None:
        try:
            if address.password is not None:
                user = () if address.user is None else (address.user,)
                self.ask("AUTH", *user, address.password)
            if address.database:
                self.ask("SELECT", address.database)
            self.ask("PING")
        except RefusedError as error:
            raise StoreError("login", str(error)) from error

    def ask(self, *words: bytes | str | int) -> Reply:
        """One command and its reply. Raises StoreError or RefusedError."""
        self.send([command(*words)])
        return self.reply()

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all of `parts`, one after another."""
        left = [memoryview(part) for part in parts]
        try:
            while left:
                self._socket.settimeout(self._left_s())
                count = self._socket.sendmsg(left)
                while left and count >= left[0].nbytes:
                    count -= left.pop(0).nbytes
                if count:
                    left[0] = left[0][count:]
        except OSError as error:
            raise self._failed(error) from error

    def reply(self) -> Reply:
        """The next reply that is no payload. Raises StoreError or RefusedError."""
        kind, rest = self._line()
        if kind == b"+":
            return rest
        if kind == b"-":
            raise RefusedError(rest.decode(errors="replace"))
        if kind == b":":
            return self._number(rest)
        if kind == b"*":
            count = self._number(rest, most=_MOST_ITEMS)
            return [self.reply() for _ in range(count)]
        length = self._length(kind, rest)
        if length is None:
            return None
        if length > _MOST_TEXT:
            raise StoreError(
                "protocol", f"a reply of {length} bytes; expected {_MOST_TEXT} at most"
            )
        text = bytearray(length)
        self.read(memoryview(text))
        self.end_payload()
        return bytes(text)

    def payload_length(self) -> int | None:
        """Bytes of the payload that the next reply is; None where there is none.

        Have them read by `read`, then `end_payload`. Raises StoreError or RefusedError.
        """
        kind, rest = self._line()
        if kind == b"-":
            raise RefusedError(rest.decode(errors="replace"))
        return self._length(kind, rest)

    def read(self, into: memoryview) -> None:
        """Fill `into` with what comes next."""
        done = min(len(into), self._end - self._start)
        into[:done] = memoryview(self._buffer)[self._start : self._start + done]
        self._start += done
        while done < len(into):
            done += self._receive(into[done:])

    def end_payload(self) -> None:
        """Read the line's end behind a payload."""
        end = bytearray(2)
        self.read(memoryview(end))
        if end != b"\r\n":
            raise StoreError("protocol", "a payload is longer than its reply said")

    @property
    def is_usable(self) -> bool:
        """Whether the other end is there and has said nothing unasked. Does not wait."""
        try:
            self._socket.setblocking(False)
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._start == self._end
        except OSError:
            pass
        return False

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _line(self) -> tuple[bytes, bytes]:
        while (at := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._start:
                left = self._buffer[self._start : self._end]
                self._start, self._end = 0, len(left)
                self._buffer[: len(left)] = left
            if self._end == len(self._buffer):
                raise StoreError("protocol", f"a line of more than {_LINE_BYTES} bytes")
            self._end += self._receive(memoryview(self._buffer)[self._end :])
        line = bytes(self._buffer[self._start : at])
        self._start = at + 2
        return line[:1], line[1:]

    def _length(self, kind: bytes, rest: bytes) -> int | None:
        if kind != b"$":
            raise StoreError("protocol", f"a reply that begins with {kind!r}; expected '$'")
        return None if rest == b"-1" else self._number(rest)

    @staticmethod
    def _number(text: bytes, most: int = 1 << 40) -> int:
        if not text.isdigit() or len(text) > 13 or int(text) > most:
            raise StoreError("protocol", f"a reply says {text[:32]!r}; expected a number")
        return int(text)

    def _receive(self, into: memoryview) -> int:
        try:
            self._socket.settimeout(self._left_s())
            count = self._socket.recv_into(into)
        except OSError as error:
            raise self._failed(error) from error
        if count == 0:
            raise StoreError("down", "the store has closed the connection")
        return count

    def _left_s(self) -> float:
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise StoreError("late", "the store took too long")
        return left_s

    @staticmethod
    def _failed(error: OSError) -> StoreError:
        if isinstance(error, TimeoutError):
            return StoreError("late", "the store took too long")
        return StoreError("down", error.strerror or str(error))
