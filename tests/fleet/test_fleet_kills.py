"""Replicas die and drain under streams of every kind: no token is lost, and none is twice.

`benchmarks/fleet_kills.py` does it for long, with processes and real links.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fleets import Fleet, Mortal, fleet
from servers import wait_for

from hotset.engine.completion import Completion, gather
from hotset.request import NOT_AVAILABLE, POISONED, RequestOutput, SamplingParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7, "n": 3},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 2},
    {"temperature": 0.8, "seed": 1, "stop": ("zz", "qx"), "min_tokens": 20},
    {"json_schema": SCHEMA, "ignore_eos": False, "max_tokens": 60},
    {"prompt_logprobs": 1, "top_k": 5, "temperature": 1.0, "seed": 3},
]


def asked(i: int) -> tuple[list[int], SamplingParams]:
    kind = {"max_tokens": 80, "ignore_eos": True, **KINDS[i % len(KINDS)]}
    return [5 + i, 6, 7, 8], SamplingParams(**kind)


def read(front: Fleet, i: int, came: list[int]) -> list[Completion]:
    """A stream to its end; notes how many tokens came when."""
    prompt, params = asked(i)

    def outputs() -> Iterator[RequestOutput]:
        for output in front.service.submit(prompt, params, request_id=f"s{i}"):
            came.append(len(output.token_ids))
            yield output

    return gather(outputs(), params.n)


def assert_same(got: Completion, whole: Completion) -> None:
    """All but the rounding of probabilities, which depends on what ran beside."""
    assert (got.token_ids, got.text) == (whole.token_ids, whole.text)
    assert (got.finish_reason, got.error) == (whole.finish_reason, whole.error)
    assert got.prompt_tokens == whole.prompt_tokens
    for entries, others in (
        (got.logprobs, whole.logprobs),
        (got.prompt_logprobs, whole.prompt_logprobs),
    ):
        assert [one.token_id for one in entries] == [one.token_id for one in others]
        assert [one.text_offset for one in entries] == [one.text_offset for one in others]
        assert [one.logprob for one in entries] == pytest.approx([one.logprob for one in others])


@pytest.mark.parametrize("seed", range(2))
def test_streams_outlive_replicas_that_die_and_drain_at_random_points(seed: int) -> None:
    rng, num = random.Random(seed), 8
    with fleet(1) as one:
        wholes = [read(one, i, []) for i in range(num)]
    with fleet(3) as front, ThreadPoolExecutor(num) as readers:
        came: list[int] = []
        reading = [readers.submit(read, front, i, came) for i in range(num)]
        num_tokens = sum(len(one.token_ids) for whole in wholes for one in whole)
        moments = sorted(rng.randrange(num_tokens // 2) for _ in range(4))
        for moment, dies in zip(moments, (True, False, True, False), strict=True):
            wait_for(lambda moment=moment: sum(came) >= moment)
            serving = [one.host for one in front.service._dispatcher.roster.serving]
            front.add()
            host = rng.choice(serving)
            assert isinstance(host, Mortal)
            if dies:
                host.cut(aborts=True)
            else:
                host.drain(0.0)
        answers = [one.result(60) for one in reading]
        counts = front.service.fleet().counts
        assert counts.lost == 2 and counts.drains == 2 and counts.resumed
        num_whole = 0
        for answer, whole in zip(answers, wholes, strict=True):
            for got, all_of_it in zip(answer, whole, strict=True):
                if got.finish_reason == "error":  # its replicas died one after the other
                    assert got.code in (NOT_AVAILABLE, POISONED) and got.error
                    assert all_of_it.token_ids[: len(got.token_ids)] == got.token_ids
                    continue
                num_whole += 1
                assert_same(got, all_of_it)
        assert num_whole >= num
        wait_for(lambda: not any(host.loop._entries for host in front.hosts))
        front.check()
