"""A front over replicas: what it does when they die, drain, refuse and come back."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from fleets import Fleet, Mortal, fleet
from servers import build, wait_for

from hotset.engine.completion import Completion, gather
from hotset.engine.engine import Engine
from hotset.engine.messages import Submit
from hotset.errors import EngineError, OverloadedError, RequestError
from hotset.fleet.status import GivenUp, Moved, Why
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import NOT_AVAILABLE, POISONED, SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture
def two() -> Iterator[Fleet]:
    with fleet(2) as made:
        yield made


def read(stream: object, n: int = 1) -> list[Completion]:
    """All outputs of a stream, within a minute."""
    return gather(stream, n)  # type: ignore[arg-type]


def answer(
    front: Fleet, params: SamplingParams = SHORT, prompt: tuple[int, ...] = (5, 6)
) -> Completion:
    return read(front.service.submit(prompt, params))[0]


def holder(front: Fleet) -> Mortal:
    """The replica that has the only request."""
    [place] = [one for one in front.service._dispatcher.roster.connected if one.flights]
    return place.host  # type: ignore[return-value]


def test_requests_take_turns_on_replicas_and_their_counters_add_up(two: Fleet) -> None:
    answers = [answer(two) for _ in range(4)]
    assert [one.token_ids for one in answers] == [answers[0].token_ids] * 4
    assert [host.metrics.output_tokens for host in two.hosts] == [16, 16]
    assert two.service.metrics.output_tokens == 32
    assert two.service.fleet().counts.routed == {("r0", Why.TURN): 2, ("r1", Why.TURN): 2}
    status = two.service.status().result(30)
    single = two.hosts[0].loop._engine.kv.pool.num_usable
    assert status.tiers[0].capacity == 2 * single
    two.check()


def test_a_status_has_all_snapshots_that_were_asked_for_by_then(two: Fleet) -> None:
    two.service._route.num_snapshots = 3
    assert two.service.fleet().counts.snapshots == 3


def test_what_all_replicas_refuse_is_refused_at_once(two: Fleet) -> None:
    with pytest.raises(RequestError, match="empty"):
        two.service.submit([], SHORT)
    assert not two.service.fleet().counts.retried
    two.check()


def test_a_replica_with_a_full_queue_passes_a_request_on_and_all_full_ones_refuse() -> None:
    with fleet(2, max_num_seqs=1, max_num_batched_tokens=16) as front:
        streams = [front.service.submit([5 + i], LONG) for i in range(40)]
        with pytest.raises(OverloadedError):
            for i in range(40):
                streams.append(front.service.submit([9, 5 + i], LONG, queue_limit=4))
        for stream in streams:
            stream.abort()
        wait_for(lambda: all(not host.loop._entries for host in front.hosts))
        front.check()


def test_a_request_without_a_token_is_submitted_again_three_times() -> None:
    with fleet(5) as front:
        for host in front.hosts:
            host.hold()
        stream = front.service.submit([5, 6], SHORT)
        for number in range(4):
            wait_for(lambda: any(one.flights for one in front.service._dispatcher.roster.connected))
            host = holder(front)
            assert len(front.service._dispatcher.roster.connected) == 5 - number
            host.cut()
        [completion] = read(stream)
        assert completion.finish_reason == "error" and completion.code == NOT_AVAILABLE
        counts = front.service.fleet().counts
        assert counts.retried == {Moved.LOST: 3} and counts.given_up == {GivenUp.RETRIES: 1}
        assert counts.routed.total() == 4


def fails_at(token: int) -> Callable[[Options], tuple[Engine, LoadedModel]]:
    """Builds an engine that ends with a prompt that has this token, in its first step."""

    def build_mortal(options: Options) -> tuple[Engine, LoadedModel]:
        engine, loaded = build(options)
        step = engine.step

        def die(*, num_queued: int = 0) -> object:
            if any(token in one.token_ids for one in engine.scheduler.waiting):
                raise MemoryError("of this prompt")
            return step(num_queued=num_queued)

        engine.step = die  # type: ignore[method-assign, assignment]
        return engine, loaded

    return build_mortal


def test_a_request_that_ends_two_replicas_is_not_tried_on_a_third() -> None:
    with fleet(0) as front:
        for _ in range(3):
            front.add(fails_at(77))
        others = [front.service.submit([5, 6 + i], LONG) for i in range(3)]
        [poisoned] = read(front.service.submit([77], SHORT))
        assert poisoned.finish_reason == "error" and poisoned.code == POISONED
        assert len(front.service.replica_ids) == 1 and front.service.healthy
        # What else ran on the two is not taken for the cause, unless it too was on both.
        ended = [read(stream)[0] for stream in others]
        assert [one.finish_reason for one in ended].count("length") >= 2
        assert front.service.fleet().counts.given_up[GivenUp.POISONED] >= 1


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_request_is_poisonous_where_two_replicas_died_not_where_they_fell_silent(
    is_silent: bool,
) -> None:
    with fleet(3) as front:
        stream = front.service.submit([5, 6], LONG)
        completion, num_losses = Completion(), 0
        for output in stream:
            if output.token_ids and num_losses < 2:
                holder(front).cut(is_silent=is_silent)
                num_losses += 1
            completion.add(output)
        assert completion.code == (None if is_silent else POISONED)
        assert completion.finish_reason == ("length" if is_silent else "error")
        given_up = front.service.fleet().counts.given_up
        assert given_up == ({} if is_silent else {GivenUp.POISONED: 1})


def test_a_request_waits_for_a_replica_that_comes_back_and_not_for_ever() -> None:
    with fleet(1, wait_s=30.0) as front:
        stream = front.service.submit([5, 6], LONG)
        next(iter(stream))
        stream = front.service.submit([5, 6], LONG)
        front.hosts[0].cut()
        with pytest.raises(EngineError, match="no replica is there"):
            front.service.submit([5, 6], SHORT)
        front.add()
        assert read(stream)[0].finish_reason == "length"
        front.service._dispatcher._wait_s = 0.0
        stream = front.service.submit([5, 6], LONG)
        front.hosts[1].cut()
        wait_for(lambda: front.service._dispatcher._waiting)
        front.service.look_for_engine()
        [completion] = read(stream)
        assert completion.finish_reason == "error" and completion.code == NOT_AVAILABLE
        assert front.service.fleet().counts.given_up == {GivenUp.NO_REPLICA: 1}


def test_a_request_that_no_replica_takes_again_does_not_wait_for_ever(two: Fleet) -> None:
    def refuse(submit: Submit) -> None:
        raise EngineError("not now")

    stream = two.service.submit([5, 6], LONG)
    host = holder(two)
    [other] = [one for one in two.hosts if one is not host]
    other.submit = refuse
    two.service._dispatcher._wait_s = 0.3
    host.cut()
    for _ in range(100):  # as readers do, more often
        two.service.look_for_engine()
        time.sleep(0.01)
        if not two.service._dispatcher._flights:
            break
    [completion] = read(stream)
    assert completion.finish_reason == "error" and completion.code == NOT_AVAILABLE
    assert other.is_alive and two.service.healthy


@pytest.mark.parametrize(
    ("change", "why", "says"),
    [
        ({"fingerprint": "x"}, GivenUp.FINGERPRINT, "no other has its model"),
        (
            {"numerics": "x"},
            GivenUp.NUMERICS,
            "the others with its model round numbers in another way: their device or kernels are "
            "not the same",
        ),
    ],
)
def test_an_answer_never_goes_on_at_a_replica_of_another_kind(
    two: Fleet, change: dict[str, str], why: GivenUp, says: str
) -> None:
    other = two.service._dispatcher.roster.connected[1].host
    other.info = replace(other.info, **change)
    stream = two.service.submit([5, 6], LONG)
    reader = iter(stream)
    next(reader)
    two.service._dispatcher._wait_s = math.inf  # and does not wait for it either
    two.hosts[0].cut()
    last = list(reader)[-1]
    assert last.error == f"the replica that had this request has ended, and {says}"
    assert last.code == NOT_AVAILABLE
    assert two.service.fleet().counts.given_up == {why: 1}


def test_a_request_that_has_not_begun_goes_on_at_a_replica_of_another_kind(two: Fleet) -> None:
    for host in two.hosts:
        host.info = replace(host.info, numerics=f"of {id(host)}")
    two.hosts[0].hold()
    stream = two.service.submit([5, 6], SHORT)
    two.hosts[0].cut()
    assert read(stream)[0].finish_reason == "length"


def test_a_request_that_is_aborted_ends_on_its_replica(two: Fleet) -> None:
    for _ in two.service.submit([5, 6], LONG):
        break
    wait_for(lambda: not any(host.loop._entries for host in two.hosts))
    assert two.service.metrics.requests_finished == {"abort": 1}
    two.check()


def test_an_abort_does_not_wait_for_a_replica_that_does_nothing(two: Fleet) -> None:
    for host in two.hosts:
        host.hold()
    stream = two.service.submit([5, 6], LONG)
    stream.abort()
    assert read(stream)[0].finish_reason == "abort"
    two.check()


def test_a_deadline_counts_from_the_first_submit(two: Fleet) -> None:
    for host in two.hosts:
        host.hold()
    stream = two.service.submit([5, 6], LONG, timeout_s=0.05)
    time.sleep(0.06)
    holder(two).cut()
    [completion] = read(stream)
    assert completion.finish_reason == "abort"
    assert completion.error == "the request was not done within its 0.05 s"
    assert two.service.fleet().counts.given_up == {GivenUp.TIMEOUT: 1}


def test_closing_ends_streams_before_replicas_have_heard_of_it(two: Fleet) -> None:
    stream = two.service.submit([5, 6], LONG)
    ended: list[str | None] = []
    holder(two).close = lambda: ended.append(read(stream)[0].finish_reason)  # type: ignore[method-assign]
    two.service.close()
    assert ended == ["abort"]
    assert not two.service._dispatcher._flights


def test_closing_ends_streams_and_a_task_sees_it(two: Fleet) -> None:
    async def main() -> str | None:
        stream = two.service.submit([5, 6], LONG)
        async for output in stream:
            if output.finish_reason is not None:
                return output.finish_reason.value
            await asyncio.to_thread(two.service.close)
        return None

    assert asyncio.run(main()) == "abort"
    with pytest.raises(EngineError, match="closed"):
        two.service.submit([5], SHORT)
