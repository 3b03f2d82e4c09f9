"""Where a replica listens: a Unix socket, or a host and a port. Imports no torch."""

import asyncio
import contextlib
import os
import socket
import ssl
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from hotset.errors import ConfigError

_BACKLOG = 128
_MOST_PATH_BYTES = 107  # of a Unix socket, by Linux


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, or to connect to.

    Attributes:
        host: None where `path` is of a Unix socket.
    """

    path: str = ""
    host: str | None = None
    port: int = 0

    @classmethod
    def of(cls, text: str) -> Self:
        """Read `HOST:PORT`, `[HOST]:PORT` or a path, which has a `/` and becomes absolute.

        Raises:
            ConfigError: it is none of them.
        """
        if "/" in text:
            text = os.path.abspath(text)
            if len(os.fsencode(text)) > _MOST_PATH_BYTES:
                raise ConfigError(
                    f"address {text} has more than {_MOST_PATH_BYTES} bytes, which a Unix socket "
                    "cannot have; choose a folder with a shorter path"
                )
            return cls(path=text)
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ConfigError(
                f"address {text!r} is none; expected HOST:PORT, such as 127.0.0.1:7000, or the "
                "path of a Unix socket"
            )
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        if self.host is None:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def for_others(self) -> Self:
        """What to connect to, from other machines too, where something listens here.

        A socket of all addresses of a machine is called by the machine's name.
        """
        if self.host in ("0.0.0.0", "::"):
            return replace(self, host=socket.gethostname())
        return self

    def listen(self) -> socket.socket:
        """Bind a socket; a Unix socket is the user's alone, and may lie where an old one does.

        Raises:
            ConfigError: the address cannot be used.
        """
        try:
            return self._listen_to_path() if self.host is None else self._listen_to_port()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen at {self}: {reason}; choose another address"
            ) from error

    async def connect(
        self, tls: ssl.SSLContext | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError."""
        if self.host is None:
            return await asyncio.open_unix_connection(self.path)
        return await asyncio.open_connection(self.host, self.port, ssl=tls)

    def _listen_to_port(self) -> socket.socket:
        family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)

    def _listen_to_path(self) -> socket.socket:
        _remove_if_left(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            mask = os.umask(0o177)
            try:
                listener.bind(self.path)
            finally:
                os.umask(mask)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener


def bound(listener: socket.socket) -> Address:
    """The address that a socket got."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return Address(host=name[0], port=name[1])
    return Address(path=os.fsdecode(name))


def _remove_if_left(path: str) -> None:
    """Remove the socket of a process that has ended."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
