"""Fields of both APIs: what they do, and which are taken where they ask for nothing."""

import json
from typing import Any

import httpx
import openai
import pytest
from servers import CHAT, RunningServer
from tiny_tokenizer import make_backend

from hotset.server import not_done

TOKENIZER = make_backend()
TEXT = {"prompt": "the cat", "temperature": 0, "max_tokens": 6}


def ask(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The one entry of a text completion, or of a chat's where `messages` are given."""
    is_chat = "messages" in fields
    body = {**(CHAT if is_chat else TEXT), **fields}
    response = http.post("/v1/chat/completions" if is_chat else "/v1/completions", json=body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return {**choice, "usage": response.json()["usage"]}


def refusal(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def chunks(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_a_bias_forces_and_forbids_tokens(server: RunningServer) -> None:
    [token] = TOKENIZER.encode("b").ids
    with server.openai() as client:
        answer = client.chat.completions.create(model="tiny", logit_bias={str(token): 100}, **CHAT)
    assert answer.choices[0].message.content == "bbbbbb"
    with server.http() as http:
        first = ask(http)["text"]
        ids = TOKENIZER.encode(first).ids
        assert ask(http, logit_bias={str(i): -100 for i in ids})["text"] != first
        assert ask(http, logit_bias={})["text"] == first


def test_no_end_comes_before_the_least_number_of_tokens(http: httpx.Client) -> None:
    eos = {"logit_bias": {"2": 100}, "max_tokens": 9}
    assert ask(http, **eos)["usage"]["completion_tokens"] == 1
    choice = ask(http, min_tokens=5, **eos)
    assert (choice["finish_reason"], choice["usage"]["completion_tokens"]) == ("stop", 6)


def test_stops_and_special_tokens_are_in_the_text_where_asked_for(http: httpx.Client) -> None:
    text = ask(http, max_tokens=12)["text"]
    stop = text[2:4]
    assert ask(http, max_tokens=12, stop=[stop])["text"] == text[: text.index(stop)]
    kept = ask(http, max_tokens=12, stop=[stop], include_stop_str_in_output=True)["text"]
    assert kept == text[: text.index(stop)] + stop
    user = TOKENIZER.token_to_id("<user>")
    special = {"logit_bias": {str(user): 100}, "max_tokens": 2}
    assert ask(http, **special)["text"] == ""
    assert ask(http, skip_special_tokens=False, **special)["text"] == "<user><user>"
    for fields, joined in (
        ({}, ""),
        ({"skip_special_tokens": False}, "<user><user>"),
        ({"skip_special_tokens": False, "logit_bias": {"2": 100}}, ""),
        (
            {
                "skip_special_tokens": False,
                "logit_bias": {"2": 100},
                "include_stop_str_in_output": True,
            },
            "<eos>",
        ),
    ):
        chat = ask(http, messages=CHAT["messages"], logprobs=True, **{**special, **fields})
        found = b"".join(bytes(one["bytes"]) for one in chat["logprobs"]["content"])
        assert found.decode() == chat["message"]["content"] == joined


def test_an_answer_goes_on_with_the_last_message(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]
    prompt = "<user>hi<eos><assistant>the cat"
    plain = ask(http, prompt=TOKENIZER.encode(prompt).ids)["text"]
    for fields in ({}, {"add_generation_prompt": False}):
        chat = ask(http, messages=messages, continue_final_message=True, **fields)
        assert chat["message"]["content"] == plain
    without = ask(http, messages=messages, add_generation_prompt=False)["message"]["content"]
    assert without == ask(http, prompt=TOKENIZER.encode(f"{prompt}<eos>").ids)["text"]
    both = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    assert "both true" in refusal(http, "/v1/chat/completions", both)["message"]
    empty = {"messages": [{"role": "user", "content": " "}], "continue_final_message": True}
    error = refusal(http, "/v1/chat/completions", empty)
    assert error["param"] == "continue_final_message" and "no text" in error["message"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_choice": ["red", "blue"]}, ("red", "blue")),
        ({"structured_outputs": {"choice": ["日本"]}}, ("日本",)),
        ({"guided_regex": "a{3}"}, ("aaa",)),
        ({"structured_outputs": {"regex": "x|y"}}, ("x", "y")),
        ({"guided_json": {"const": 5}}, ("5",)),
        ({"guided_json": '{"const": 5}'}, ("5",)),
        ({"structured_outputs": {"json": {"const": 1}, "whitespace_pattern": None}}, ("1",)),
        ({"structured_outputs": {"grammar": 'start: "ab" "c"'}}, ("abc",)),
        ({"guided_grammar": 'root ::= "ab" "c"'}, ("abc",)),
    ],
)
def test_forms_are_followed_as_vllm_has_them(
    http: httpx.Client, fields: dict[str, Any], expected: tuple[str, ...]
) -> None:
    for kind in ({}, {"messages": CHAT["messages"]}):
        choice = ask(http, max_tokens=30, temperature=1, **kind, **fields)
        text = choice["message"]["content"] if kind else choice["text"]
        assert text in expected and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "asks for no form"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "expected a string"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "not supported"),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
            "is true, which is not supported; expected false",
        ),
        ({"guided_choice": []}, "guided_choice", "no texts"),
        ({"guided_json": "{"}, "guided_json", "guided_json is not JSON from line 1"),
        ({"guided_json": "[]"}, "guided_json", "JSON list; expected an object"),
        ({"guided_regex": "("}, "guided_regex", "regex"),
        ({"guided_regex": "a" * 70_000}, "guided_regex", "size"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex both say"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "response_format both say",
        ),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens", "form to follow"),
        ({"min_tokens": 7}, "min_tokens", "expected 0 to max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "expected token ids, as strings"),
        ({"logit_bias": {"512": 1}}, "logit_bias", "expected 0 to 511"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "expected -100 to 100"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        (
            {"stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "needs include_usage",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(
    http: httpx.Client, fields: dict[str, Any], param: str, says: str
) -> None:
    error = refusal(http, "/v1/completions", {**TEXT, **fields})
    assert error["param"] == param and says in error["message"], error


def test_usage_goes_on_where_asked_for(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        *found, last = chunks(http, path, {**body, "stream_options": options, "ignore_eos": True})
        counts = [chunk["usage"]["completion_tokens"] for chunk in found]
        assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == 6
        assert last["usage"]["completion_tokens"] == 6 and not last["choices"]
        for chunk in found:
            usage = chunk["usage"]
            assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize(
    ("path", "base", "known"),
    [
        ("/v1/chat/completions", CHAT, not_done.OF_CHATS),
        ("/v1/completions", TEXT, not_done.OF_TEXTS),
    ],
)
def test_what_asks_for_nothing_is_taken_and_anything_else_refused_by_name_and_value(
    http: httpx.Client, path: str, base: dict[str, Any], known: not_done.Known
) -> None:
    plain = http.post(path, json=base).json()["choices"]
    harmless = {name: values[0] if values else None for name, values in known.items()}
    more = {"store": False, "n": 1, "top_k": -1, "min_tokens": 0, "logit_bias": {}, "stop": None}
    response = http.post(path, json={**base, **harmless, **more, "unheard_of": None})
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == plain
    for name in known:
        error = refusal(http, path, {**base, name: ["what"]})
        assert error["param"] == name and error["code"] == "unsupported_parameter"
        assert error["message"].startswith(f'{name} is ["what"], which is not supported; expected ')
    assert refusal(http, path, {**base, "priority": False})["param"] == "priority"


def test_the_official_client_takes_usage_and_bias(server: RunningServer) -> None:
    with server.openai() as client:
        stream = client.chat.completions.create(
            model="tiny",
            stream=True,
            stream_options={"include_usage": True},
            modalities=["text"],
            store=False,
            parallel_tool_calls=True,
            extra_body={"structured_outputs": {"choice": ["yes", "no"]}, "min_tokens": 0},
            **CHAT,
        )
        text = "".join(c.delta.content or "" for chunk in stream for c in chunk.choices)
        assert text in ("yes", "no")
        with pytest.raises(openai.BadRequestError, match="audio"):
            client.chat.completions.create(model="tiny", modalities=["text", "audio"], **CHAT)
