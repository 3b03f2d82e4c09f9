"""The client of the Redis protocol: addresses, and replies as servers may send them."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from hotset.errors import ConfigError
from hotset.memory.remote.resp import Address, Connection, RefusedError, StoreError, command


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host", Address("host:6379", "host", 6379)),
        ("redis://u:p%40ss@h:1/3", Address("h:1", "h", 1, None, "u", "p@ss", 3)),
        ("redis://:p@[::1]:2", Address("[::1]:2", "::1", 2, None, None, "p")),
        ("unix:///a/b", Address("/a/b", path="/a/b")),
        ("unix:///a?password=x%26y&db=2", Address("/a", path="/a", password="x&y", database=2)),
    ],
)
def test_an_address_is_read_from_its_url(url: str, address: Address) -> None:
    assert Address.of(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "http://u:hidden@h",
        "redis://",
        "unix://h/a",
        "redis://h:x",
        "redis://h/x",
        "h:1",
        "redis://h?a=1",
    ],
)
def test_what_is_no_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected redis://.* or unix:///path") as caught:
        Address.of(url)
    assert "hidden" not in str(caught.value)


class Peer:
    """The other end of a connection that said hello."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        address = Address("", "127.0.0.1", listener.getsockname()[1])
        greeting = threading.Thread(target=self._greet, args=(listener,))
        greeting.start()
        self.connection = Connection(address, time.monotonic() + 5)
        greeting.join()
        self.connection.deadline_s = time.monotonic() + 5
        listener.close()

    def _greet(self, listener: socket.socket) -> None:
        self.socket, _ = listener.accept()
        self.socket.sendall(b"+PONG\r\n")

    def says(self, data: bytes) -> Connection:
        self.socket.sendall(data)
        return self.connection


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.connection.close()
    peer.socket.close()


def test_replies_of_each_kind_are_read_one_after_another(peer: Peer) -> None:
    connection = peer.says(
        b"+OK\r\n:12\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n:1\r\n$1\r\nx\r\n-ERR no\r\n:7\r\n"
    )
    assert [connection.reply() for _ in range(5)] == [b"OK", 12, b"a\r\n", None, [1, b"x"]]
    with pytest.raises(RefusedError, match="ERR no"):
        connection.reply()
    assert connection.reply() == 7


def test_a_payload_comes_into_the_callers_memory_whole(peer: Peer) -> None:
    payload = bytes(range(256)) * 1000
    sender = threading.Thread(
        target=peer.says, args=(b"$%d\r\n%b\r\n:5\r\n" % (len(payload), payload),)
    )
    sender.start()
    into = bytearray(len(payload))
    assert peer.connection.payload_length() == len(payload)
    peer.connection.read(memoryview(into))
    peer.connection.end_payload()
    sender.join()
    assert into == payload and peer.connection.reply() == 5


@pytest.mark.parametrize(
    "data",
    [
        b"!\r\n",
        b":\r\n",
        b":-1\r\n",
        b"$9999999\r\n",
        b"*99999999\r\n",
        b"+" + b"x" * 20_000,
        b"$1\r\nxyz",
    ],
)
def test_what_is_no_reply_ends_the_connection(peer: Peer, data: bytes) -> None:
    with pytest.raises(StoreError) as caught:
        peer.says(data).reply()
    assert caught.value.fault == "protocol"


def test_one_that_sends_a_byte_now_and_then_is_late_by_the_deadline(peer: Peer) -> None:
    peer.connection.deadline_s = time.monotonic() + 0.2
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.02):
            peer.socket.sendall(b"+")

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(StoreError) as caught:
        peer.connection.reply()
    stop.set()
    dripping.join()
    assert caught.value.fault == "late"


def test_one_that_hangs_up_is_down(peer: Peer) -> None:
    peer.socket.close()
    with pytest.raises(StoreError) as caught:
        peer.connection.ask("PING")
    assert caught.value.fault == "down"


def test_a_command_has_the_length_of_each_word() -> None:
    assert command("GET", b"\r\n", 12) == b"*3\r\n$3\r\nGET\r\n$2\r\n\r\n\r\n$2\r\n12\r\n"
