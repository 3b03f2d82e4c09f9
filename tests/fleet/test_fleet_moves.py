"""Answers go on at another replica as if nothing had happened, whatever was asked for."""

from collections.abc import Iterator

import pytest
from fleets import Fleet, Mortal, fleet
from servers import wait_for

from hotset.engine.completion import Completion, gather
from hotset.engine.messages import Submit
from hotset.fleet.status import Moved, ReplicaState
from hotset.request import SamplingParams

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture
def two() -> Iterator[Fleet]:
    with fleet(2) as made:
        yield made


def answer(front: Fleet, params: SamplingParams = SHORT) -> Completion:
    return gather(front.service.submit([5, 6], params), 1)[0]


def holder(front: Fleet) -> Mortal:
    """The replica that has the only request."""
    [place] = [one for one in front.service._dispatcher.roster.connected if one.flights]
    return place.host  # type: ignore[return-value]


def test_a_stream_goes_on_elsewhere_when_its_replica_dies(two: Fleet) -> None:
    whole = answer(two, LONG)
    completion = Completion()
    stream = two.service.submit([5, 6], LONG)
    for output in stream:
        if not completion.token_ids:
            holder(two).cut()
        completion.add(output)
    assert completion.finish_reason == "length"
    assert completion.token_ids == whole.token_ids and completion.text == whole.text
    counts = two.service.fleet().counts
    assert counts.resumed == {Moved.LOST: 1} and sum(counts.pause.counts) == 1
    assert [one.state for one in two.service.fleet().replicas].count(ReplicaState.LOST) == 1
    assert two.service.metrics.output_tokens >= 400 - 1  # those of the lost one stay counted


def test_what_a_lost_replica_says_late_is_dropped(two: Fleet) -> None:
    whole = answer(two, LONG)
    completion = Completion()
    for output in two.service.submit([5, 6], LONG):
        if not completion.token_ids:
            host = holder(two)
            host.cut()
            wait_for(lambda: not any(one.loop._entries for one in two.hosts if one._is_cut))
            host.replay()
        completion.add(output)
    assert completion.token_ids == whole.token_ids and completion.text == whole.text


def test_a_draining_replica_gives_up_its_requests_and_gets_no_new_ones(two: Fleet) -> None:
    whole = answer(two, LONG)
    streams = [two.service.submit([5, 6], LONG) for _ in range(4)]
    readers = [iter(stream) for stream in streams]
    completions = [Completion() for _ in streams]
    for completion, reader in zip(completions, readers, strict=True):
        completion.add(next(reader))
    two.hosts[0].drain(0.0)
    for completion, reader in zip(completions, readers, strict=True):
        for output in reader:
            completion.add(output)
    assert [one.token_ids for one in completions] == [whole.token_ids] * 4
    assert [one.text for one in completions] == [whole.text] * 4
    before = two.hosts[0].metrics.prompt_tokens
    for _ in range(4):
        answer(two)
    assert two.hosts[0].metrics.prompt_tokens == before
    counts = two.service.fleet().counts
    assert counts.resumed == {Moved.DRAINED: 2} and counts.drains == 1
    two.check()


def test_sampled_requests_have_a_seed_so_that_they_can_go_on(two: Fleet) -> None:
    seen: list[Submit] = []
    for host in two.hosts:
        submit = host.submit
        host.submit = lambda one, submit=submit: (seen.append(one), submit(one))  # type: ignore
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0)
    completion = Completion()
    for output in two.service.submit([5, 6], params):
        if not completion.token_ids:
            holder(two).cut()
        completion.add(output)
    first, second = seen
    assert first.params.seed is not None and first.params.seed == second.params.seed
    with fleet(1) as other:
        whole = answer(other, first.params)
    assert completion.token_ids == whole.token_ids and completion.text == whole.text
