"""What is no front, or no replica, at the other end of a connection."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from links import SECRET, Front, Replica

from hotset.engine.messages import EngineInfo, Submit
from hotset.errors import EngineError
from hotset.fleet import link as link_module
from hotset.fleet import link_host, listener, wire
from hotset.fleet.address import Address, bound
from hotset.fleet.link import Link
from hotset.fleet.proof import LinkError, prove_front, prove_replica
from hotset.options import Options
from hotset.request import SamplingParams

FEW = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with contextlib.closing(Replica(Address(host="127.0.0.1"))) as made:
        yield made


def connect(replica: Replica) -> socket.socket:
    address = Address.of(replica.address)
    return socket.create_connection((address.host, address.port), timeout=30)


def told(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(4096):
            data += piece
    return data


def serves(replica: Replica) -> bool:
    front = Front(replica.address)
    front.host.submit(Submit("a", [5], SamplingParams(max_tokens=1, ignore_eos=True)))
    is_over = front.outputs("a")[-1].finish_reason is not None
    front.host.close()
    return is_over


@pytest.mark.parametrize(
    "sent",
    [
        bytes(range(64)),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b" " * 64,
        b"\x16\x03\x01" + bytes(200),
        bytes(10),
        b"",
    ],
)
def test_who_has_no_secret_gets_random_bytes_and_one_line_is_logged(
    replica: Replica, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    with caplog.at_level(logging.INFO), connect(replica) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert len(told(connection)) == 32
    assert serves(replica)
    lines = [one.getMessage() for one in caplog.records if "no link to" in one.getMessage()]
    assert len(lines) == 1


def test_who_says_nothing_is_left_after_a_while(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.1)
    with connect(replica) as connection:
        connection.sendall(b"\0")
        assert len(told(connection)) == 32
    assert "it took more than 0.1 s" in caplog.text


def test_connections_that_prove_nothing_are_bounded(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_MOST_UNPROVEN", 2)
    with connect(replica) as one, connect(replica) as two:
        assert len(one.recv(32)) == len(two.recv(32)) == 32
        with connect(replica) as three:
            assert told(three) == b""
        one.close()
        two.close()
    monkeypatch.undo()
    assert serves(replica)


class Relay:
    """Passes on what a front and a replica send, and keeps it; may change a byte.

    Args:
        flips: index of the byte to change among those that the replica sends.
    """

    def __init__(self, replica: Replica, flips: int = -1) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = str(bound(self._server))
        self.of_front = b""
        self._flips = flips
        self._replica = replica
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        front, _ = self._server.accept()
        with self._server, front, connect(self._replica) as replica:
            asking = threading.Thread(target=self._pass_requests, args=(front, replica))
            asking.start()
            num_bytes = 0
            with contextlib.suppress(OSError):
                while data := bytearray(replica.recv(4096)):
                    if num_bytes <= self._flips < num_bytes + len(data):
                        data[self._flips - num_bytes] ^= 1
                    num_bytes += len(data)
                    front.sendall(data)
            for one in (front, replica):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            asking.join()

    def _pass_requests(self, front: socket.socket, replica: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := front.recv(4096):
                self.of_front += data
                replica.sendall(data)
            replica.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def test_a_proof_that_was_overheard_is_of_no_use(replica: Replica) -> None:
    with contextlib.closing(Relay(replica)) as relay:
        Front(relay.address).host.close()
    with connect(replica) as connection:
        connection.sendall(relay.of_front)
        assert len(told(connection)) == 32


@pytest.mark.parametrize(
    ("flips", "said"),
    [
        (3, "is the fleet secret the same there"),  # of the random bytes
        (40, "it has another fleet secret, or none"),
        (64 + 3, "expected at most|was changed|did not answer|has closed"),  # the length
        (64 + 4 + 10, "a message was changed on its way"),
    ],
)
def test_what_is_changed_on_its_way_is_never_taken(
    replica: Replica, flips: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_host, "HANDSHAKE_S", 1.0)  # a length may ask for more than comes
    with (
        contextlib.closing(Relay(replica, flips)) as relay,
        pytest.raises(EngineError, match=f"no link to the replica at .*({said})"),
    ):
        Front(relay.address)


def test_a_front_with_another_secret_is_told_what_to_look_at(replica: Replica) -> None:
    with pytest.raises(EngineError, match="is the fleet secret the same there"):
        Front(replica.address, b"another secret, as long")


@contextlib.asynccontextmanager
async def proven(replica: Replica) -> AsyncIterator[Link]:
    """A connection of who has the secret, before any greeting."""
    reader, writer = await Address.of(replica.address).connect(None)
    link = Link(reader, writer, await prove_front(reader, writer, SECRET))
    try:
        yield link
    finally:
        link.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def next_message(link: Link) -> bytes:
    while not (message := await link.receive(wire.MOST_BYTES)):
        pass
    return message


@contextlib.asynccontextmanager
async def greeted(replica: Replica) -> AsyncIterator[Link]:
    async with proven(replica) as link:
        link.send(wire.encode(wire.Hello([1])))
        assert isinstance(wire.read_greeting(await next_message(link)), wire.Welcome)
        yield link


def test_a_front_of_another_version_is_told_which_there_are(replica: Replica) -> None:
    async def run() -> None:
        async with proven(replica) as link:
            link.send(wire.encode(wire.Hello([7, 8])))
            answer = wire.read_greeting(await next_message(link))
            assert isinstance(answer, wire.Refused)
            assert (
                "the front speaks versions [7, 8] of the link, and this replica [1]"
                in answer.reason
            )
            with pytest.raises(LinkError, match="has closed"):
                await next_message(link)

    asyncio.run(run())


@pytest.mark.parametrize("message", [b"\xc1", b"x" * (wire.MOST_HELLO_BYTES + 1), b"\x81\x01"])
def test_a_greeting_that_is_none_ends_the_connection(replica: Replica, message: bytes) -> None:
    async def run() -> None:
        async with proven(replica) as link:
            link.send(message)
            with pytest.raises(LinkError, match="has closed"):
                await next_message(link)

    asyncio.run(run())
    assert serves(replica)


def test_a_message_that_is_too_long_ends_the_link_before_it_is_read(replica: Replica) -> None:
    async def run() -> None:
        async with greeted(replica) as link:
            link._writer.write((wire.MOST_BYTES + 1).to_bytes(4, "big"))
            with pytest.raises(LinkError, match="has closed"):
                while True:
                    await next_message(link)

    asyncio.run(run())
    assert serves(replica)


def test_a_submit_that_cannot_be_read_is_refused_and_the_link_goes_on(replica: Replica) -> None:
    async def run() -> None:
        async with greeted(replica) as link:
            for number, raw in enumerate([b"\x80", b"\xc0", b"", b"\x81\xa1x\x01"]):
                link.send(wire.encode(wire.Submitted(number, raw)))
            answers: list[wire.Answer] = []
            while len(answers) < 4:
                answers += wire.read_batch(await next_message(link)).answers
            assert [one.number for one in answers] == [0, 1, 2, 3]
            assert all("cannot be read" in one.refusal.message for one in answers if one.refusal)

    asyncio.run(run())


@FEW
@given(st.binary(max_size=200))
def test_any_bytes_before_the_proof_are_answered_with_the_same_nothing(
    replica: Replica, data: bytes
) -> None:
    with connect(replica) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert len(told(connection)) == 32


KNOWN = [
    wire.encode(message)
    for message in (
        wire.Hello([1], ["x"]),
        wire.submitted(1, Submit("a", [1, 2], SamplingParams(stop=("x",)))),
        wire.Abort("a"),
        wire.Look(3),
        wire.Follow(True),
    )
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with some bytes changed, cut off or put in."""
    data = bytearray(draw(st.sampled_from(KNOWN)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(data)


@FEW
@given(st.lists(damaged() | st.binary(min_size=1, max_size=60), min_size=1, max_size=4))
def test_any_messages_of_who_has_the_secret_leave_the_replica_as_it_was(
    replica: Replica, messages: list[bytes]
) -> None:
    async def run() -> None:
        async with greeted(replica) as link:
            for message in messages:
                link.send(message)
            link.send(wire.encode(wire.Look(99)))
            with contextlib.suppress(LinkError):
                while not wire.read_batch(await next_message(link)).reports:
                    pass

    asyncio.run(run())
    assert serves(replica)


class FakeReplica:
    """Runs a coroutine on each connection that has proved the secret; a replica gone wrong."""

    def __init__(self, act: Callable[[Link], Awaitable[None]], secret: bytes = SECRET) -> None:
        self._socket = Address(host="127.0.0.1").listen()
        self.address = str(bound(self._socket))
        self._act, self._secret = act, secret
        self._loop = asyncio.new_event_loop()
        self._is_over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._run()])
        self._thread.start()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._greet, sock=self._socket)
        await self._is_over.wait()
        server.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(LinkError):
            link = Link(reader, writer, await prove_replica(reader, writer, self._secret))
            await link.receive(wire.MOST_BYTES)
            await self._act(link)
        writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join(30)
        self._loop.close()


async def _close(link: Link) -> None:
    pass


async def _garbage(link: Link) -> None:
    link.send(b"\xc1\xc1")


async def _refuse(link: Link) -> None:
    link.send(wire.encode(wire.Refused("not you")))


async def _no_options(link: Link) -> None:
    model = wire.ModelData("tiny", "f", (1,), 10)
    link.send(wire.encode(wire.Welcome(1, "r1", model, {"max_model_len": 10})))


async def _no_tokenizer(link: Link) -> None:
    info = {"options": {}, "max_model_len": 1, "report": "", "keeps_states": False}
    info |= {"fingerprint": "", "block_size": 16, "kv_bytes_per_token": 1}
    model = wire.ModelData("tiny", "f", (1,), 10, tokenizer_digest="0" * 32)
    link.send(wire.encode(wire.Welcome(1, "r1", model, info)))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (_close, "has closed the connection"),
        (_garbage, "no link to the replica at"),
        (_refuse, "not you"),
        (_no_options, "replica r1 cannot be used: options are missing"),
        (_no_tokenizer, "replica r1 cannot be used: the tokenizer of 'tiny' did not come"),
    ],
)
def test_a_replica_that_greets_wrongly_is_not_used(
    act: Callable[[Link], Awaitable[None]], said: str
) -> None:
    with contextlib.closing(FakeReplica(act)) as fake, pytest.raises(EngineError, match=said):
        Front(fake.address)


async def _garbage_later(link: Link) -> None:
    info = wire.info_data(EngineInfo(Options.of(), 512, "", True, "f", 16, 64))
    link.send(wire.encode(wire.Welcome(1, "r1", wire.ModelData("tiny", "f", (1,), 10), info)))
    link.send(b"\xc1")
    with contextlib.suppress(LinkError):
        await next_message(link)


def test_a_replica_that_later_sends_what_is_no_message_is_left_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.closing(FakeReplica(_garbage_later)) as fake:
        front = Front(fake.address)
        failure = front.reports.get(timeout=30).failure
        assert failure is not None
        assert failure.startswith("the link to replica r1 has ended: MessagePack data is malformed")
        front.host.close()
    assert not caplog.records


def test_a_replica_that_says_nothing_is_left_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_host, "HANDSHAKE_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(EngineError, match=r"it did not answer within 0\.1 s"),
    ):
        Front(str(bound(silent)))


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def test_a_side_that_is_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "BEAT_S", 0.001)

    async def run() -> None:
        ours, theirs = _pair()
        with theirs:
            link = Link(*await asyncio.open_connection(sock=ours), link_module.Keys(b"a", b"b"))
            with pytest.raises(link_module.SilentError, match=r"has sent nothing for 0\.005 s"):
                await link.run(lambda message: None)
            link.abort()

    asyncio.run(run())


def test_a_side_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "BEAT_S", 0.001)

    async def run() -> None:
        ours, theirs = _pair()
        with theirs:
            link = Link(*await asyncio.open_connection(sock=ours), link_module.Keys(b"a", b"b"))
            link.send(bytes(2**22))
            link._silent_beats = -(2**30)  # as if it beat
            with pytest.raises(link_module.SilentError, match=r"has taken nothing for 0\.005 s"):
                await link.run(lambda message: None)
            link.abort()

    asyncio.run(run())
