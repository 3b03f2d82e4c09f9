"""Replicas that fetch from each other's host memory."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeClock
from stores import PAYLOAD_BYTES, answer, content, key, read, seal, until

from hotset.errors import ConfigError
from hotset.memory.remote.peer_server import PeerServer
from hotset.memory.remote.peers import PeerTier
from hotset.memory.remote.seal import Seal
from hotset.memory.tier import Answer, CompletionStatus


class Host:
    """Host memory of a replica that serves its peers."""

    def __init__(self, url: str, by: Seal | None = None) -> None:
        self.payloads: dict[bytes, bytes] = {}
        self.is_busy = False
        self.server = PeerServer(
            url,
            by or seal(),
            payload_bytes=PAYLOAD_BYTES,
            has=self.payloads.__contains__,
            copy_out=self.copy_out,
            is_busy=lambda: self.is_busy,
        )

    def copy_out(self, one: bytes, into: memoryview) -> bool:
        if one in self.payloads:
            into[:] = self.payloads[one]
        return one in self.payloads


@pytest.fixture(params=["unix", "tcp"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    url = f"unix://{tmp_path / 'peer'}"
    if request.param == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"redis://127.0.0.1:{free.getsockname()[1]}"
    host = Host(url)
    for number in range(8):
        host.payloads[key(number)] = bytes(content(number))
    yield host
    host.server.close()


def peers(by: Seal | None = None) -> PeerTier:
    return PeerTier(by or seal(writer="another"), payload_bytes=PAYLOAD_BYTES)


@pytest.mark.parametrize("encrypts", [False, True])
def test_what_a_peer_has_comes_bit_for_bit(host: Host, encrypts: bool) -> None:
    host.server._seal = seal(encrypts=encrypts)
    tier = peers()
    assert tier.lookup([key(1)]) == [Answer.MISS]  # nobody said that a peer has it
    tier.expect([key(number) for number in range(10)], host.server.url)
    assert [answer(tier, number) for number in range(10)] == [Answer.HIT] * 8 + [Answer.MISS] * 2
    for number in range(8):
        completion, found = read(tier, number)
        assert completion.status is CompletionStatus.OK and found == content(number)
    assert tier.usage().faults == {}
    until(lambda: host.server.sent_bytes == 8 * PAYLOAD_BYTES)
    tier.close()


def test_a_peer_that_lost_it_or_is_busy_is_a_miss(host: Host) -> None:
    tier = peers()
    tier.expect([key(1), key(2)], host.server.url)
    assert [answer(tier, number) for number in (1, 2)] == [Answer.HIT] * 2
    del host.payloads[key(1)]
    assert read(tier, 1)[0].fault == "missing"
    assert tier.lookup([key(1)]) == [Answer.MISS]  # and is not asked for again
    host.is_busy = True
    assert read(tier, 2)[0].fault == "missing"
    tier.close()


def test_a_peer_is_forgotten_to_have_what_it_had_a_while_ago(host: Host) -> None:
    clock = FakeClock()
    tier = PeerTier(seal(), payload_bytes=PAYLOAD_BYTES, clock=clock)
    tier.expect([key(1)], host.server.url)
    assert answer(tier, 1) is Answer.HIT
    clock.now_s = 6.0
    assert tier.lookup([key(1)]) == [Answer.PENDING]
    tier.close()


@pytest.mark.parametrize(
    "other", [seal(secret=b"another fleet's secret"), seal(fingerprint="another model")]
)
def test_whoever_has_another_secret_or_model_is_not_let_in(host: Host, other: Seal) -> None:
    tier = peers(other)
    tier.expect([key(1)], host.server.url)
    assert answer(tier, 1) is Answer.MISS
    assert tier.usage().faults["peer_connection_login"] == 1
    tier.close()


def test_a_stranger_gets_nothing_from_the_server(tmp_path: Path) -> None:
    host = Host(f"unix://{tmp_path / 'peer'}")
    host.payloads[key(1)] = bytes(content(1))
    name = seal().names([key(1)])[0]
    for said in (b"*1\r\n$4\r\nPING\r\n", b"*2\r\n$3\r\nGET\r\n$16\r\n%b\r\n" % name, b"x" * 5000):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(tmp_path / "peer"))
            stranger.sendall(said)
            heard = b""
            while part := stranger.recv(4096):
                heard += part
        assert heard in (b"", b"-WRONGPASS another secret or model\r\n")
    host.server.close()
    assert not (tmp_path / "peer").exists()


def test_a_peer_that_is_gone_is_left_alone(host: Host) -> None:
    tier = peers()
    tier.expect([key(number) for number in range(8)], host.server.url)
    assert answer(tier, 1) is Answer.HIT
    host.server.close()
    assert [read(tier, number)[0].status for number in range(4)] == [CompletionStatus.FAILED] * 4
    assert tier.lookup([key(5)]) == [Answer.MISS]
    tier.close()


def test_hints_that_are_none_are_counted_and_no_more(tmp_path: Path) -> None:
    tier = peers()
    tier.expect([key(1)], "http://nowhere")
    assert tier.lookup([key(1)]) == [Answer.MISS]
    assert tier.usage().faults == {"peer_unknown": 1}
    assert tier.submit_write(key(1), memoryview(content(1)), must=True) is None
    tier.close()


def test_an_address_that_nobody_can_listen_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="where nobody can listen"):
        Host(f"unix://{tmp_path / 'none' / 'peer'}")


def test_many_peers_at_once_each_get_what_they_ask_for(tmp_path: Path) -> None:
    host = Host(f"unix://{tmp_path / 'peer'}")
    host.payloads.update({key(number): bytes(content(number)) for number in range(20)})
    wrong = list[int]()

    def fetch() -> None:
        tier = peers()
        tier.expect(list(host.payloads), host.server.url)
        for number in range(20):
            if read(tier, number)[1] != content(number):
                wrong.append(number)
        tier.close()

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    host.server.close()
    until(lambda: not host.server._connections)
