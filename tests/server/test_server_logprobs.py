"""Log-probabilities over HTTP: whose bytes, places and values they are."""

from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
import torch
from servers import CHAT, RunningServer
from tiny_models import make_model
from tiny_tokenizer import VOCAB_SIZE, make_backend

from hotset.request import FinishReason, RequestOutput, TokenLogprob
from hotset.server import admission
from hotset.server.body import parse_body
from hotset.server.forms import encode, encode_in_parts
from hotset.server.keys import Tenant
from hotset.server.limits import Limits
from hotset.server.responses import make_writers
from hotset.server.schemas import TextRequest

TOKENIZER = make_backend()
CONST = "😀漢字ď, so \N{REPLACEMENT CHARACTER}"


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


def expected_logprobs(ids: list[int]) -> torch.Tensor:
    """Of transformers on the same weights: `[T - 1, V]`, a row for each token but the first."""
    model = make_model("llama", vocab_size=VOCAB_SIZE)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


def pick(row: torch.Tensor, token_id: int) -> float:
    return row[token_id].item()


def test_an_echo_has_the_log_probabilities_of_the_prompt(http: httpx.Client) -> None:
    """As lm-eval asks: prompts of token ids, at once, one token to generate."""
    prompts = [TOKENIZER.encode(text).ids for text in ("the cat 😀", "<bos> a dog, the cat")]
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1}
    for _ in range(2):  # from scratch, and where all of it is cached
        answer = post(http, "/v1/completions", {**body, "echo": True, "seed": 1234})
        assert answer["usage"]["completion_tokens"] == 2
        for ids, choice in zip(prompts, answer["choices"], strict=True):
            found, rows = choice["logprobs"], expected_logprobs(ids)
            assert len(found["tokens"]) == len(ids) + 1
            assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            # What lm-eval makes of it: a sum, and whether the continuation is the greedy one.
            start, greedy = 3, rows[2:].argmax(-1).tolist() == ids[3:]
            score = sum(found["token_logprobs"][start:-1])
            assert score == pytest.approx(sum(map(pick, rows[2:], ids[3:])), abs=1e-3)
            pairs = zip(found["token_logprobs"], found["top_logprobs"], strict=True)
            tops = [value == max(top.values()) for value, top in list(pairs)[start:-1]]
            assert all(tops) == greedy
            values = found["token_logprobs"][1:-1]
            wanted = [row[i].item() for i, row in zip(ids[1:], rows, strict=True)]
            assert values == pytest.approx(wanted, abs=2e-4)
            for value, top, row in zip(values, found["top_logprobs"][1:-1], rows, strict=True):
                assert max(top.values()) == pytest.approx(row.max().item(), abs=2e-4)
                assert len(top) == 1 + (value != max(top.values()))
            for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
                if not token.startswith("bytes:") and not token.startswith("<"):
                    assert choice["text"][offset : offset + len(token)] == token


def test_an_echo_without_a_token_is_the_prompt_alone(http: httpx.Client) -> None:
    body = {"prompt": "the cat", "max_tokens": 0, "echo": True, "logprobs": 2, "n": 2}
    answer = post(http, "/v1/completions", body)
    ids = TOKENIZER.encode("the cat").ids
    for choice in answer["choices"]:
        assert choice["text"] == "the cat" and choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(ids)
        assert len(choice["logprobs"]["top_logprobs"][1]) in (2, 3)
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == len(ids)
    streamed = ["", ""]
    entries: list[list[Any]] = [[], []]
    with http.stream(
        "POST", "/v1/completions", json={**body, "max_tokens": 2, "stream": True}
    ) as s:
        for line in s.iter_lines():
            if line.startswith("data: {"):
                [chunk] = httpx.Response(200, text=line[6:]).json()["choices"]
                streamed[chunk["index"]] += chunk["text"]
                entries[chunk["index"]] += chunk["logprobs"]["token_logprobs"]
    assert all(text.startswith("the cat") for text in streamed)
    for found in entries:
        assert found[: len(ids)] == answer["choices"][0]["logprobs"]["token_logprobs"]
        assert len(found) > len(ids)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompt_logprobs_have_the_form_of_vllm(http: httpx.Client, path: str) -> None:
    prompt = {"prompt": "the cat"} if path == "/v1/completions" else {"messages": CHAT["messages"]}
    ids = http.post("/tokenize", json=prompt).json()["tokens"]
    answer = post(http, path, {**prompt, "max_tokens": 1, "prompt_logprobs": 2, "n": 2})
    holders = answer["choices"] if path == "/v1/completions" else [answer]
    for holder in holders:
        first, *found = holder["prompt_logprobs"]
        assert first is None and len(found) == len(ids) - 1
        for token_id, row, places in zip(ids[1:], expected_logprobs(ids), found, strict=True):
            own = places[str(token_id)]
            assert own["logprob"] == pytest.approx(row[token_id].item(), abs=2e-4)
            assert own["decoded_token"] and len(places) in (2, 3)
            assert {place["rank"] for place in places.values()} >= {1, 2}
    refused = http.post(path, json={**prompt, "prompt_logprobs": 1, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"
    refused = http.post(path, json={**prompt, "prompt_logprobs": 21})
    assert "prompt_logprobs is 21" in refused.json()["error"]["message"]


def test_a_long_answer_is_written_as_any_other() -> None:
    part = {"1": {"logprob": -0.5, "decoded_token": 'é"'}}
    answer = {"a": None, "choices": [{"prompt_logprobs": [None, part, part], "text": "x"}, {}, []]}
    for levels in range(6):
        assert encode_in_parts(answer, levels) == encode(answer)


def test_what_cannot_be_written_is_not_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[MagicMock] = []

    def submit(*args: object, **kwargs: object) -> MagicMock:
        streams.append(MagicMock())
        return streams[-1]

    def fail(*args: object) -> None:
        raise ValueError("of a library")

    monkeypatch.setattr(admission, "make_writers", fail)
    service = MagicMock(submit=submit)
    admit = admission.Admission(service, MagicMock(), Limits())
    request = parse_body(TextRequest, {"prompt": [[1], [2]], "echo": True, "logprobs": 1})
    with pytest.raises(ValueError, match="of a library"):
        admit.submit(request, Tenant())
    assert [stream.abort.call_count for stream in streams] == [1, 1]


def test_a_chat_has_to_have_a_token(http: httpx.Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        refused = http.post("/v1/chat/completions", json={**CHAT, name: 0})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == f"{name} is 0; expected 1 or more"


def test_an_answer_has_a_bounded_number_of_prompts_log_probabilities(
    server: RunningServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": [[5] * 10, [6] * 10], "max_tokens": 0, "echo": True, "logprobs": 1}
    admission = server.api._parts.admission  # type: ignore[union-attr]
    monkeypatch.setattr(admission, "limits", Limits(max_prompt_logprobs=40))
    post(http, "/v1/completions", body)
    refused = http.post("/v1/completions", json={**body, "n": 2}).json()["error"]
    assert refused["param"] == "n" and "80 log-probabilities" in refused["message"]
