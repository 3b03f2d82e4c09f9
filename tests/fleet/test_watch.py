"""A front that finds its replicas in a directory, over real links."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleets import LinkedReplica
from servers import RunningServer, running_server, wait_for

from hotset.engine.completion import gather
from hotset.errors import EngineError
from hotset.fleet.directory import Directory, make_private
from hotset.fleet.route import RoundRobin
from hotset.fleet.service import FleetService
from hotset.fleet.status import Moved
from hotset.fleet.watch import Watcher
from hotset.request import SamplingParams

LONG = SamplingParams(max_tokens=300, ignore_eos=True)
CHAT = {
    "messages": [{"role": "user", "content": "the cat"}],
    "temperature": 0,
    "max_tokens": 300,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_private(tmp_path / "fleet")
    return tmp_path / "fleet"


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def watched(folder: Path, secret: bytes) -> FleetService:
    service = FleetService(RoundRobin())
    Watcher(service, Directory(folder), secret).wait()
    return service


def test_a_front_finds_replicas_that_come_and_is_done_with_those_that_end(
    folder: Path, stack: contextlib.ExitStack
) -> None:
    first = stack.enter_context(contextlib.closing(LinkedReplica(folder, "a")))
    service = stack.enter_context(contextlib.closing(watched(folder, first.secret)))
    [whole] = gather(service.submit([5, 6], LONG), 1)
    second = stack.enter_context(contextlib.closing(LinkedReplica(folder, "b")))
    wait_for(lambda: service.replica_ids == {"a", "b"})
    streams = [service.submit([5, 6], LONG) for _ in range(4)]
    readers = [iter(stream) for stream in streams]
    starts = [next(reader) for reader in readers]
    second.listener.drain(0.0)  # as at SIGTERM; its requests move
    answers = [
        [*start.token_ids, *(i for output in reader for i in output.token_ids)]
        for start, reader in zip(starts, readers, strict=True)
    ]
    assert answers == [whole.token_ids] * 4
    assert service.fleet().counts.resumed.total() == 2
    second.close()
    wait_for(lambda: service.replica_ids == {"a"})
    assert not service.fleet().counts.lost  # it had said that it would
    wait_for(lambda: not first.host._entries)
    assert first.host._engine.kv.pool.num_held == 0


def test_a_link_that_breaks_is_made_again_and_no_token_is_lost(
    folder: Path, stack: contextlib.ExitStack
) -> None:
    replica = stack.enter_context(contextlib.closing(LinkedReplica(folder, "a")))
    service = stack.enter_context(contextlib.closing(watched(folder, replica.secret)))
    [whole] = gather(service.submit([5, 6], LONG), 1)
    reader = iter(service.submit([5, 6], LONG))
    token_ids = list(next(reader).token_ids)
    [front] = replica.listener._fronts
    replica.listener._thread.call(front.link.abort)
    token_ids += [i for output in reader for i in output.token_ids]
    assert token_ids == whole.token_ids
    wait_for(lambda: not replica.host._entries)
    assert replica.host._engine.kv.pool.num_held == 0


def test_a_replica_that_says_nothing_is_counted_as_silent_and_its_stream_goes_on(
    folder: Path, stack: contextlib.ExitStack
) -> None:
    replicas = [
        stack.enter_context(contextlib.closing(LinkedReplica(folder, name))) for name in "ab"
    ]
    service = stack.enter_context(contextlib.closing(watched(folder, replicas[0].secret)))
    wait_for(lambda: service.replica_ids == {"a", "b"})
    [whole] = gather(service.submit([5, 6], LONG), 1)
    reader = iter(service.submit([5, 6], LONG))
    token_ids = list(next(reader).token_ids)
    [at] = [one for one in service._dispatcher.roster.connected if one.flights]
    [front] = replicas["ab".index(at.replica_id)].listener._fronts
    front.link.send = lambda message: None  # type: ignore[method-assign]
    link: Any = at.host
    counts = service.fleet().counts

    def is_silent() -> int:
        link._link._silent_beats = 5  # the seconds until then have passed
        return counts.silent

    wait_for(is_silent)
    token_ids += [i for output in reader for i in output.token_ids]
    assert token_ids == whole.token_ids
    assert counts.lost == counts.silent == 1 and counts.resumed == {Moved.SILENT: 1}


def test_a_front_with_another_secret_gets_no_replica(
    folder: Path, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hotset")
    stack.enter_context(contextlib.closing(LinkedReplica(folder, "a")))
    service = stack.enter_context(contextlib.closing(FleetService(RoundRobin())))
    watcher = Watcher(service, Directory(folder), b"another secret of a fleet")
    wait_for(lambda: any("replica a is not connected" in one for one in caplog.messages))
    assert not service.healthy
    service.close()
    with pytest.raises(EngineError, match="closed"):
        watcher.wait()


def stream_text(server: RunningServer) -> str:
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=CHAT) as response:
        return "".join(response.iter_lines())


def test_the_api_serves_over_links_and_a_client_that_leaves_ends_its_request(
    folder: Path, stack: contextlib.ExitStack
) -> None:
    replicas = [
        stack.enter_context(contextlib.closing(LinkedReplica(folder, name))) for name in "ab"
    ]
    server = stack.enter_context(running_server(start=lambda: watched(folder, replicas[0].secret)))
    assert stream_text(server).count("[DONE]") == 1
    with server.http() as http:
        assert http.get("/status.json").json()["model"] == "tiny"
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            http.stream("POST", "/v1/chat/completions", json=CHAT) as response,
        ):
            next(response.iter_lines())
    wait_for(lambda: not any(replica.host._entries for replica in replicas))
    assert all(replica.host._engine.kv.pool.num_held == 0 for replica in replicas)
