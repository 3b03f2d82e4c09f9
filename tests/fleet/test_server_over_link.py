"""The server answers over a link as it does with the engine in its own process."""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from links import SECRET, Replica
from servers import CHAT, RunningServer, running_server, wait_for

from hotset.fleet.address import Address
from hotset.fleet.link_host import LinkHost
from hotset.fleet.route import RoundRobin
from hotset.fleet.service import FleetService

SAMPLED = {**CHAT, "temperature": 1.0, "seed": 7, "max_tokens": 12}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["a", "b"]}}},
    },
}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": CHAT,
    "sampled": SAMPLED,
    "seed beyond 64 bits": {**SAMPLED, "seed": 2**70},
    "several": {**SAMPLED, "n": 3},
    "log-probabilities": {**CHAT, "logprobs": True, "top_logprobs": 3},
    "biases and penalties": {
        **SAMPLED,
        "logit_bias": {"7": 50, "9": -100},
        "presence_penalty": 1.5,
        "repetition_penalty": 1.1,
    },
    "stop": {**CHAT, "max_tokens": 40, "stop": ["e", "é"]},
    "schema": {
        **CHAT,
        "max_tokens": 60,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"enum": [10**25, "é", None]}},
        },
    },
    "tool": {**CHAT, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"},
    "deadline": {**CHAT, "max_tokens": 480, "ignore_eos": True, "timeout_s": 0.02},
    "too long": {**CHAT, "max_tokens": 10**6},
    "no such model": {**CHAT, "model": "other"},
    "no schema": {
        **CHAT,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(?=a)b"}},
        },
    },
}


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    path = tmp_path_factory.mktemp("replica") / "s"
    with contextlib.closing(Replica(Address(path=str(path)))) as made:
        yield made


@pytest.fixture(scope="module")
def front(replica: Replica) -> Iterator[RunningServer]:
    def start() -> FleetService:
        service = FleetService(RoundRobin())
        service.add("r1", partial(LinkHost, replica.address, SECRET))
        return service

    with running_server(start=start) as running:
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


def answer(server: RunningServer, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body, without what differs between two answers to the same request."""
    with server.http() as http:
        response = http.post("/v1/chat/completions", json=body)
    found = response.json()
    for name in ("id", "created"):
        found.pop(name, None)
    for choice in found.get("choices", ()):
        for call in choice["message"].get("tool_calls") or ():
            call.pop("id")
    found.get("usage", {}).pop("prompt_tokens_details", None)  # what was asked before is cached
    return response.status_code, found


def events(server: RunningServer, body: dict[str, Any]) -> list[Any]:
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0]["delta"] for line in lines]


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_answer_is_the_same(
    front: RunningServer, alone: RunningServer, body: dict[str, Any]
) -> None:
    assert answer(front, body) == answer(alone, body)


def test_a_stream_is_the_same(front: RunningServer, alone: RunningServer) -> None:
    body = {**SAMPLED, "max_tokens": 30, "stream": True}
    texts = ["".join(one.get("content") or "" for one in events(s, body)) for s in (front, alone)]
    assert texts[0] == texts[1] != ""


def test_a_client_that_goes_away_ends_its_request_at_the_replica(
    front: RunningServer, replica: Replica
) -> None:
    body = {**CHAT, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with front.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
        assert replica.listener.num_open == 1
    wait_for(lambda: not replica.listener.num_open and not replica.host._entries)


def test_status_and_metrics_have_the_replica_in_them(front: RunningServer) -> None:
    with front.http() as http:
        wait_for(lambda: http.get("/status.json").json()["engine"]["tiers"])
        wait_for(lambda: 'replica="r1"' in http.get("/metrics").text)
