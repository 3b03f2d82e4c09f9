"""Ranks that torchrun started, on this host or several: where each is, and how they connect.

torchrun starts the same command once for each GPU. Rank 0's process runs it, and its engine is the
driver; the others wait for the driver at a store that torchrun keeps for them. Ranks trust the
network between them, as all of torch.distributed does: the store hands out the key by which a
connection is known to be a rank's. Imports no torch.
"""

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Protocol

from hotset.errors import ConfigError, EngineError

_LOOPBACK = "127.0.0.1"
_MEET = "hotset/driver"  # the key in the store
_HANDSHAKE_S = 10.0  # a stranger that says nothing is let go
_LOOK_EVERY_S = 0.2
# A host that is gone, as its kernel answers for a process that is busy.
_SILENT_S = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where torchrun has put this process.

    Attributes:
        rank: of all `size` ranks.
        local_rank: of the `num_local` ranks on this host; the number of its GPU.
        address: of the host of rank 0.
    """

    rank: int
    size: int
    local_rank: int
    num_local: int
    address: str

    @property
    def num_hosts(self) -> int:
        """That ranks are on, each with as many."""
        return self.size // self.num_local

    @property
    def is_on_loopback(self) -> bool:
        """Whether all ranks reach each other without a network."""
        if self.num_local == self.size:
            return True
        with contextlib.suppress(OSError):
            return socket.gethostbyname(self.address).startswith("127.")
        return False


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None:
        """Keep a value."""

    def get(self, key: str) -> bytes:
        """The value, once it is there."""
        ...


def place() -> Place | None:
    """Where this process is; None where torchrun has not started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, num_local = (int(os.environ[name]) for name in names)
    return Place(rank, size, local_rank, num_local, os.environ["MASTER_ADDR"])


def is_other_rank(num_gpus: int) -> bool:
    """Whether this process is to be a rank that is not the driver's, see `worker.serve_driver`.

    Args:
        num_gpus: of the engine.

    Raises:
        ConfigError: torchrun has started another number of ranks.
    """
    here = place()
    if here is None:
        return False
    if here.size != num_gpus:
        asked = "one GPU is asked for" if num_gpus == 1 else f"{num_gpus} GPUs are asked for"
        raise ConfigError(
            f"torchrun started {here.size} processes and {asked}; give --gpus {here.size}, or "
            "another number of processes"
        )
    if here.size % here.num_local:
        raise ConfigError(
            f"torchrun started {here.num_local} of {here.size} processes on this host; give all "
            "hosts the same number"
        )
    return here.rank > 0


# The driver's side


class Meeting:
    """Where the other ranks connect to the driver, until all have.

    Args:
        store: that all ranks reach.
        here: rank 0's place.
    """

    def __init__(self, store: Store, here: Place) -> None:
        self._here, self._key = here, secrets.token_bytes(32)
        self._found: dict[int, tuple[Connection, str]] = {}  # with the name of the host
        self._changed = threading.Condition()
        if here.is_on_loopback:
            self._listener = socket.create_server((_LOOPBACK, 0))
        elif socket.has_dualstack_ipv6():
            self._listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True
            )
        else:
            self._listener = socket.create_server(("", 0))
        address = _LOOPBACK if here.is_on_loopback else here.address
        port = self._listener.getsockname()[1]
        store.set(_MEET, f"{address} {port} {self._key.hex()}")

    def wait(self, timeout_s: float) -> dict[int, tuple[Connection, str]]:
        """The connection to each other rank, and the name of its host; ends the meeting.

        Raises:
            EngineError: some have not come.
        """
        self._listener.settimeout(_LOOK_EVERY_S)
        deadline_s = time.monotonic() + timeout_s
        with self._listener:
            while len(self._found) < self._here.size - 1:
                if time.monotonic() > deadline_s:
                    missing = sorted({*range(1, self._here.size)} - self._found.keys())
                    raise EngineError(
                        f"rank {missing[0]}: it has not connected for {timeout_s:g} seconds"
                    )
                with contextlib.suppress(TimeoutError):
                    accepted, _ = self._listener.accept()
                    threading.Thread(target=self._meet, args=(accepted,), daemon=True).start()
        return self._found

    def _meet(self, accepted: socket.socket) -> None:
        """Take a rank in; a stranger is let go without a word."""
        connection = _connection(accepted)
        try:
            with _bounded(connection):
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
                rank, _, host = connection.recv_bytes(1024).decode().partition(" ")
            self._found[int(rank)] = connection, host
        except Exception:  # whatever a stranger makes it raise
            connection.close()


# The other ranks' side


def find_driver(store: Store, here: Place, timeout_s: float) -> Connection:
    """The connection to the driver, once it is there.

    The store may still say where the driver of an earlier start was.

    Raises:
        EngineError: it cannot be reached.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        address, port, key = store.get(_MEET).decode().split()
        try:
            return _reach(address, int(port), bytes.fromhex(key), here)
        except (OSError, EOFError, AuthenticationError, AssertionError) as error:
            if time.monotonic() > deadline_s:
                raise EngineError(
                    f"rank {here.rank} cannot reach rank 0 at {address}: {error}; see whether "
                    "the hosts reach each other at any port"
                ) from error
            time.sleep(_LOOK_EVERY_S)


def _reach(address: str, port: int, key: bytes, here: Place) -> Connection:
    connection = _connection(socket.create_connection((address, port), _HANDSHAKE_S))
    try:
        with _bounded(connection):
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            connection.send_bytes(f"{here.rank} {socket.gethostname()}".encode())
    except BaseException:
        connection.close()
        raise
    return connection


def cut(connection: Connection) -> None:
    """End a connection for both sides; a thread that waits for it wakes up."""
    with _socket_of(connection) as opened, contextlib.suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)


def _connection(opened: socket.socket) -> Connection:
    opened.settimeout(None)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        opened.setsockopt(socket.IPPROTO_TCP, option, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _SILENT_S)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_S * 1000)
    return Connection(opened.detach())


@contextlib.contextmanager
def _socket_of(connection: Connection) -> Iterator[socket.socket]:
    opened = socket.socket(fileno=connection.fileno())
    try:
        yield opened
    finally:
        opened.detach()


@contextlib.contextmanager
def _bounded(connection: Connection) -> Iterator[None]:
    """Within it, to wait for the other side for too long is an OSError."""
    with _socket_of(connection) as opened:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            opened.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(_HANDSHAKE_S), 0))
    yield
    with _socket_of(connection) as opened:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            opened.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 0, 0))
