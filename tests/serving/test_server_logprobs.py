"""Log-probabilities over HTTP: whose bytes, places and values they are."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import CHAT, RunningServer, running_server
from tiny_tokenizer import make_backend

from hotset.request import FinishReason, RequestOutput, TokenLogprob
from hotset.server.responses import make_writers
from hotset.server.schemas import TextRequest, parse_body

TOKENIZER = make_backend()
CONST = "😀漢字ď, so \N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def schema(value: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": value}}}


def test_the_bytes_of_a_chat_join_to_its_content(http: httpx.Client) -> None:
    body = {**CHAT, "max_tokens": 90, "response_format": schema(CONST), "logprobs": True}
    [choice] = post(http, "/v1/chat/completions", {**body, "top_logprobs": 3})["choices"]
    content, entries = choice["message"]["content"], choice["logprobs"]["content"]
    assert choice["finish_reason"] == "stop" and CONST in content
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == content.encode()
    assert entries[-1]["token"] == "<eos>" and entries[-1]["bytes"] == []
    assert r"bytes:\xf0" in [entry["token"] for entry in entries]
    for entry in entries:
        assert all({"token", "bytes", "logprob"} == top.keys() for top in entry["top_logprobs"])


def test_offsets_of_a_text_index_it(http: httpx.Client) -> None:
    body = {"prompt": "the ", "max_tokens": 90, "response_format": schema(CONST), "logprobs": 2}
    [choice] = post(http, "/v1/completions", body)["choices"]
    text, found = choice["text"], choice["logprobs"]
    assert CONST in text
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if token.startswith("bytes:"):
            assert text[offset].encode()[0] >= 0x80
        elif token != "<eos>":
            assert text[offset : offset + len(token)] == token
    assert found["text_offset"][-1] == len(text)


def test_streamed_offsets_are_those_of_the_whole_text(http: httpx.Client) -> None:
    body = {"prompt": "the", "max_tokens": 30, "temperature": 0, "logprobs": 1, "echo": False}
    [choice] = post(http, "/v1/completions", body)["choices"]
    text, offsets = "", []
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                [chunk] = httpx.Response(200, text=line[6:]).json()["choices"]
                text += chunk["text"]
                offsets += chunk["logprobs"]["text_offset"]
    assert (text, offsets) == (choice["text"], choice["logprobs"]["text_offset"])


def test_of_tokens_with_one_name_the_likeliest_counts(server: RunningServer) -> None:
    """Two ids of this vocabulary have the same bytes; the chosen one is there in any case."""
    encoder = server.api._parts.admission.encoder  # type: ignore[union-attr]
    request = parse_body(TextRequest, {"prompt": "a", "logprobs": 2})
    [writer] = make_writers(request, encoder, "r", [[1]])
    [a, b] = (TOKENIZER.encode(letter).ids[0] for letter in "ab")
    token = TokenLogprob(b, -3.0, ((a, -0.5), (a, -2.0)))
    output = RequestOutput("r", 0, "b", (b,), FinishReason.LENGTH, logprobs=(token,))
    chunk = writer.chunk(output)
    assert chunk is not None and chunk["logprobs"]["top_logprobs"] == [{"a": -0.5, "b": -3.0}]
