"""A front and a replica with a real link between them, over an engine in a thread."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from links import Front, Replica
from servers import wait_for

from hotset.engine.messages import Report, Submit
from hotset.engine.status import EngineStatus
from hotset.errors import DrainingError, EngineError, OverloadedError, RequestError
from hotset.fleet import wire
from hotset.fleet.address import Address
from hotset.fleet.link import Link
from hotset.fleet.proof import Keys
from hotset.request import FinishReason, RequestOutput, SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with contextlib.closing(Replica(Address(path=str(tmp_path_factory.mktemp("r") / "s")))) as made:
        yield made


@pytest.fixture
def front(replica: Replica) -> Iterator[Front]:
    front = Front(replica.address)
    yield front
    front.host.close()


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(one.text for one in outputs)


def is_idle(replica: Replica) -> bool:
    return not replica.listener._routes and not replica.host._entries


def test_a_request_goes_over_the_link_and_its_outputs_come_back(front: Front) -> None:
    front.host.submit(Submit("a", [5, 6, 7], SHORT))
    outputs = front.outputs("a")
    assert sum(len(one.token_ids) for one in outputs) == 8
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert front.host.model.name == "tiny"
    assert front.host.replica_id == "r1"
    assert front.host.info.max_model_len == 512
    wait_for(lambda: front.host.metrics.output_tokens >= 8)


def test_two_fronts_may_use_the_same_request_id_and_each_gets_its_own(
    replica: Replica, front: Front
) -> None:
    other = Front(replica.address)
    front.host.submit(Submit("a", [5, 6, 7], SHORT))
    other.host.submit(Submit("a", [9, 8], SamplingParams(max_tokens=3, ignore_eos=True)))
    assert sum(len(one.token_ids) for one in front.outputs("a")) == 8
    assert sum(len(one.token_ids) for one in other.outputs("a")) == 3
    other.host.close()


def test_a_request_is_forgotten_once_all_of_its_outputs_have_ended(
    replica: Replica, front: Front
) -> None:
    params = SamplingParams(max_tokens=6, n=3, seed=1, temperature=1.0, ignore_eos=True)
    front.host.submit(Submit("a", [5, 6, 7], params))
    outputs: list[RequestOutput] = []
    while len([one for one in outputs if one.finish_reason]) < 3:
        outputs += front.outputs("a")
    assert {one.index for one in outputs if one.finish_reason} == {0, 1, 2}
    wait_for(lambda: is_idle(replica))


@pytest.mark.parametrize(
    ("submit", "kind", "said"),
    [
        (Submit("a", [5] * 600, SHORT), RequestError, "512"),
        (Submit("a", [5], SHORT, queue_limit=0), OverloadedError, "try again later"),
        (Submit("a", [2**70], SHORT), RequestError, "token"),
        (Submit("a", [5], SamplingParams(stop=("\ud800",))), RequestError, "surrogate"),
    ],
)
def test_a_refused_request_raises_what_the_engine_raised(
    front: Front, submit: Submit, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        front.host.submit(submit)


def test_a_request_beyond_what_a_link_takes_is_refused_before_it_is_sent(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MOST_BYTES", 4096)
    with pytest.raises(RequestError, match=r"has \d+ bytes on a link; expected at most 4096"):
        front.host.submit(Submit("a", [5] * 5000, SHORT))


def test_a_request_id_that_is_in_use_is_refused(front: Front) -> None:
    front.host.submit(Submit("a", [5, 6, 7], LONG))
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        front.host.submit(Submit("a", [5, 6, 7], SHORT))
    front.host.abort("a")
    assert front.outputs("a")[-1].finish_reason is FinishReason.ABORT


def test_a_front_sees_the_engine(front: Front) -> None:
    front.host.look(17)
    while not (looks := front.reports.get(timeout=30).looks):
        pass
    [(number, seen)] = looks
    assert number == 17
    assert isinstance(seen, EngineStatus)
    assert seen.tiers[0].name == "device"


@pytest.mark.parametrize("how", ["close", "break"])
def test_requests_end_with_their_link_and_others_go_on(
    replica: Replica, front: Front, how: str
) -> None:
    other = Front(replica.address)
    other.host.submit(Submit("a", [5, 6, 7], LONG))
    front.host.submit(Submit("a", [5, 6], LONG))
    if how == "close":
        other.host.close()
    else:
        other.host._thread.call(other.host._link.abort)
        while (failure := other.reports.get(timeout=30).failure) is None:
            pass
        assert (
            failure == "the link to replica r1 has ended: the other side has closed the connection"
        )
        wait_for(lambda: not other.host.is_alive)
    with pytest.raises(EngineError, match="link"):
        other.host.submit(Submit("b", [5], SHORT))
    assert sum(len(one.token_ids) for one in front.outputs("a")) == 400
    wait_for(lambda: is_idle(replica))


def test_a_front_that_follows_gets_the_load_and_the_journal_until_it_leaves(
    replica: Replica, front: Front
) -> None:
    other = Front(replica.address)
    front.host.follow(True)
    front.host.submit(Submit("a", [5] * 40, SHORT))
    other.host.submit(Submit("b", [6] * 40, SHORT))
    seen: list[Report] = []
    while not any(report.journal is not None and report.journal.ends for report in seen):
        seen.append(front.reports.get(timeout=30))
    while not any(report.load is not None for report in seen):
        seen.append(front.reports.get(timeout=30))
    other.outputs("b")
    other.host.close()
    front.host.close()
    wait_for(lambda: not replica.listener._followers)


def test_a_replica_that_drains_says_so_and_takes_no_more(tmp_path: Path) -> None:
    replica = Replica(Address(path=str(tmp_path / "s")))
    front = Front(replica.address)
    front.host.submit(Submit("a", [5, 6, 7], LONG))
    replica.listener.drain(0.0)
    reports = []
    while not any(one.outputs and one.outputs[-1].finish_reason for one in reports):
        reports.append(front.reports.get(timeout=30))
    assert any(report.is_draining for report in reports)
    assert reports[-1].outputs[-1].finish_reason is FinishReason.MOVED
    with pytest.raises(DrainingError):
        front.host.submit(Submit("b", [5], SHORT))
    late = Front(replica.address)
    assert late.reports.get(timeout=30).is_draining
    for one in (front, late):
        one.host.close()
    replica.close()
    assert not Path(replica.address).exists()


def test_what_a_tcp_link_loses_is_sent_again_each_second() -> None:
    async def times() -> list[int]:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            Link(reader, writer, Keys(b"a" * 32, b"b" * 32))
            connection = writer.get_extra_info("socket")
            found = [connection.getsockopt(socket.IPPROTO_TCP, one) for one in (16, 44)]
            writer.close()
            await writer.wait_closed()
            return found

    if not Path("/proc/sys/net/ipv4/tcp_rto_max_ms").exists():
        pytest.skip("needs Linux 6.15 or newer")
    assert asyncio.run(times()) == [1, 1000]
