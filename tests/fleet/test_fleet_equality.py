"""Three replicas answer as one does, and so do those that give an answer up every few tokens."""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fleets import Fleet, Moving, fleet
from links import SECRET, Replica
from moved_answers import KINDS, PROMPT, assert_same
from servers import RunningServer, running_server, wait_for

from hotset.engine.completion import Completion, gather
from hotset.fleet.address import Address
from hotset.fleet.link_host import LinkHost
from hotset.fleet.route import RoundRobin
from hotset.fleet.service import FleetService
from hotset.fleet.status import Moved
from hotset.request import SamplingParams

ASK = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 60, "seed": 3}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "maxLength": 8}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def fleets() -> Iterator[dict[str, Fleet]]:
    """One replica; three; and three that give an answer up after each 1 or 4 tokens of it."""
    with contextlib.ExitStack() as stack:
        made = {
            name: stack.enter_context(fleet(num, block_size=4))
            for name, num in {"one": 1, "three": 3, "moving": 3, "moving less": 3}.items()
        }
        for name, every in (("moving", 1), ("moving less", 4)):
            for host in made[name].hosts:
                Moving(host, every)
        yield made
        for one in made.values():
            one.check()


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_answer_as_one_does(kind: str, fleets: dict[str, Fleet]) -> None:
    params = KINDS[kind]
    answers = {
        name: gather(one.service.submit(PROMPT, params, salt=kind.encode()), params.n)
        for name, one in fleets.items()
    }
    for name in ("three", "moving", "moving less"):
        assert_same(answers[name], answers["one"])
    assert max(len(one.token_ids) for one in answers["one"]) > 8
    counts = fleets["moving"].service.fleet().counts
    assert counts.resumed[Moved.DRAINED] > 8 and not counts.given_up


def ask(server: RunningServer, **changes: Any) -> tuple[Any, Any]:
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=ASK | changes).json()
        return answer["choices"], answer["usage"]


def streamed(server: RunningServer, **changes: Any) -> list[tuple[str, str, str | None]]:
    """Text, arguments of calls and why it ended of each choice."""
    found: dict[int, tuple[str, str, str | None]] = {}
    with server.http() as http:
        lines = http.post("/v1/chat/completions", json={**ASK, "stream": True, **changes}).text
    for line in lines.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            text, arguments, _ = found.get(choice["index"], ("", "", None))
            delta = choice["delta"]
            calls = delta.get("tool_calls") or ()
            text += delta.get("content") or ""
            arguments += "".join(one["function"].get("arguments") or "" for one in calls)
            found[choice["index"]] = text, arguments, choice["finish_reason"]
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("every", [1, 3])
def test_a_client_cannot_tell_that_an_answer_moves(every: int) -> None:
    def start(num: int) -> FleetService:
        made = stack.enter_context(fleet(num, block_size=4))
        for host in made.hosts if num > 1 else ():
            Moving(host, every)
        return made.service

    with contextlib.ExitStack() as stack:
        one, three = (
            stack.enter_context(running_server(start=partial(start, num))) for num in (1, 3)
        )
        [choice], _ = ask(one)
        text = choice["message"]["content"]
        for changes in (
            {"stop": [text[4:6] + "\\", text[20:23]], "n": 2},
            {"tools": [TOOL], "tool_choice": "required"},
            {"logprobs": True, "top_logprobs": 2, "temperature": 0, "max_tokens": 9},
        ):
            assert streamed(three, **changes) == streamed(one, **changes)
            assert without_numbers(ask(three, **changes)) == without_numbers(ask(one, **changes))


def without_numbers(answer: Any) -> Any:
    """But for log-probabilities, which rounding changes, and names that are drawn."""
    if isinstance(answer, dict):
        left = answer.keys() - {"logprob", "id", "prompt_tokens_details"}
        return {name: without_numbers(answer[name]) for name in left}
    return [without_numbers(one) for one in answer] if isinstance(answer, list | tuple) else answer


def test_replicas_that_drain_one_after_the_other_lose_nothing(tmp_path: Path) -> None:
    params = [
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=i, n=1 + i % 2)
        for i in range(12)
    ]
    with fleet(1) as one:
        streams = [one.service.submit([5 + i, 6], each) for i, each in enumerate(params)]
        expected = [answers_of(stream, each) for stream, each in zip(streams, params, strict=True)]
    with contextlib.ExitStack() as stack:
        replicas = [
            stack.enter_context(contextlib.closing(Replica(Address(path=str(tmp_path / name)))))
            for name in "abc"
        ]
        service = stack.enter_context(contextlib.closing(FleetService(RoundRobin())))
        for name, replica in zip("abc", replicas, strict=True):
            service.add(name, partial(LinkHost, replica.address, SECRET))
        streams = [service.submit([5 + i, 6], each) for i, each in enumerate(params)]
        for replica in replicas[:2]:
            before = replica.host.metrics.output_tokens
            wait_for(lambda: replica.host.metrics.output_tokens > before)  # noqa: B023
            replica.listener.drain(0.0)
        found = [answers_of(stream, each) for stream, each in zip(streams, params, strict=True)]
        assert found == expected
        counts = service.fleet().counts
        assert counts.resumed[Moved.DRAINED] + counts.retried[Moved.DRAINED] > 4
        for replica in replicas:
            assert replica.host._engine.kv.pool.num_held == 0


def answers_of(stream: Any, params: SamplingParams) -> list[tuple[str | None, str, list[int]]]:
    completions: list[Completion] = gather(stream, params.n)
    return [(one.finish_reason, one.text, one.token_ids) for one in completions]
