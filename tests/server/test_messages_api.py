"""The Anthropic Messages API, by the official client and by what a coding agent sends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from servers import CHAT, KEY, RunningServer, running_server, wait_for

from hotset.engine.completion import Completion
from hotset.errors import EngineError, HotsetError, OverloadedError, RequestError
from hotset.fleet.allowance import KeyLimits
from hotset.request import FinishReason, RequestOutput
from hotset.server.admission import Admitted
from hotset.server.app import ServerConfig
from hotset.server.body import Json, parse_body
from hotset.server.errors import ApiError, as_api_error
from hotset.server.keys import Keys, Tenant
from hotset.server.limits import Limits
from hotset.server.messages_api import MessagesForm
from hotset.server.messages_body import CountTokensRequest, MessagesRequest, chat_messages
from hotset.server.messages_error import messages_error
from hotset.server.schemas import ChatRequest

WEATHER: Any = {
    "name": "weather",
    "description": "of a place",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 4}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 6,
    "temperature": 0,
    "messages": [{"role": "user", "content": "the cat"}],
}
# Newer clients have no argument for it, though the API has.
CLIENT: dict[str, Any] = {name: value for name, value in ASK.items() if name != "temperature"}
CLIENT["extra_body"] = {"temperature": 0}
# A schema that needs many tokens: the model may not end by itself.
_LONG_TEXT = {"type": "json_schema", "schema": {"type": "string", "minLength": 9000}}
LONG: dict[str, Any] = {**CLIENT, "max_tokens": 3900, "output_config": {"format": _LONG_TEXT}}
RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(context=4096) as running:
        yield running


def connect(server: RunningServer, key: str = KEY) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with connect(server) as client:
        yield client


def test_a_message_has_the_text_of_the_chat(
    server: RunningServer, client: anthropic.Anthropic
) -> None:
    message = client.messages.create(**CLIENT)
    with server.http() as http:
        chat = http.post("/v1/chat/completions", json=CHAT).json()
    [block] = message.content
    assert block.type == "text" and block.text == chat["choices"][0]["message"]["content"]
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    usage = message.usage
    assert usage.output_tokens == 6 and usage.cache_creation_input_tokens == 0
    cached = usage.cache_read_input_tokens or 0
    assert usage.input_tokens + cached == chat["usage"]["prompt_tokens"]
    assert message.id.startswith("msg_") and message.model == "tiny"
    assert message._request_id


def test_what_the_cache_had_is_counted_apart(client: anthropic.Anthropic) -> None:
    ask = {**CLIENT, "messages": [{"role": "user", "content": "a dog and a cat " * 20}]}
    first, second = (client.messages.create(**ask).usage for _ in range(2))
    assert first.cache_read_input_tokens == 0 < (second.cache_read_input_tokens or 0)
    assert second.input_tokens + (second.cache_read_input_tokens or 0) == first.input_tokens


def test_a_stream_has_its_events_in_order_and_the_text_of_the_whole(
    client: anthropic.Anthropic,
) -> None:
    whole = client.messages.create(**CLIENT)
    with client.messages.stream(**CLIENT) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert final.content[0].model_dump(exclude={"parsed_output"}) == whole.content[0].model_dump()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 6)
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == (
        whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    )


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    text = client.messages.create(**CLIENT).content[0]
    assert text.type == "text"
    ask = {**CLIENT, "stop_sequences": ["never in it", text.text[3:5]]}
    for final in (client.messages.create(**ask), _streamed(client, ask)):
        assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", text.text[3:5])
        assert final.content[0].text == text.text[: text.text.index(text.text[3:5])]


def _streamed(client: anthropic.Anthropic, ask: Any) -> Any:
    with client.messages.stream(**ask) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_called_and_its_result_taken(client: anthropic.Anthropic, choice: Any) -> None:
    ask: Any = {**CLIENT, "max_tokens": 120, "extra_body": {}, "tools": [WEATHER]}
    ask["tool_choice"] = {**choice, "disable_parallel_tool_use": True}
    for message in (client.messages.create(**ask), _streamed(client, ask)):
        [call] = message.content
        assert call.type == "tool_use" and call.name == "weather"
        assert len(call.input["place"]) <= 4
        assert message.stop_reason == "tool_use"
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    turns = [
        *ASK["messages"],
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**{**ask, "tool_choice": {"type": "auto"}, "messages": turns})
    assert answer.content[0].type == "text"


def test_a_schema_is_followed(client: anthropic.Anthropic) -> None:
    schema = WEATHER["input_schema"]
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(**{**CLIENT, "max_tokens": 120}, output_config=config)
    assert message.content[0].type == "text"
    assert set(json.loads(message.content[0].text)) == {"place"}


def test_the_assistants_last_message_is_continued(
    server: RunningServer, client: anthropic.Anthropic
) -> None:
    turns: Any = [*ASK["messages"], {"role": "assistant", "content": "It"}]
    message = client.messages.create(**{**CLIENT, "messages": turns})
    prompt = "<user>the cat<eos><assistant>It"
    text = {"prompt": prompt, "temperature": 0, "max_tokens": 6}
    with server.http() as http:
        choice = http.post("/v1/completions", json=text).json()["choices"][0]
        ids = http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    assert message.content[0].type == "text" and message.content[0].text == choice["text"]
    assert client.messages.count_tokens(model="tiny", messages=turns).input_tokens == len(ids)


def test_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"system": "be brief", "tools": [WEATHER], "messages": ASK["messages"]}
    count = client.messages.count_tokens(model="tiny", **ask)
    usage = client.messages.create(**{**CLIENT, **ask}).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("change", "status", "kind", "says"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens is missing"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens is 0; expected 1 or more"),
        ({"model": "claude"}, 404, "not_found_error", "'claude' is not served here; 'tiny' is"),
        ({"mcp_servers": []}, 400, "invalid_request_error", "mcp_servers is not supported"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature is 1.5; expected 1 or"),
        ({"top_p": 0.0}, 400, "invalid_request_error", "top_p is 0.0; expected above 0"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences is"),
        (
            {"messages": [{"role": "user", "content": "a " * 5000}]},
            400,
            "invalid_request_error",
            "prompt is too long: the prompt has ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0.type is \"image\"; expected 'text', 'tool_use'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0.type is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0.text is missing",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_request_error", "role"),
        (
            {"messages": [*ASK["messages"], {"role": "assistant", "content": " "}]},
            400,
            "invalid_request_error",
            "the last message is the assistant's and does not end with a text to go on from",
        ),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "name is missing"),
        (
            {"tools": [{"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "any"}},
            400,
            "invalid_request_error",
            'no tools to call; tools of type "bash_20250124" are skipped',
        ),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            400,
            "invalid_request_error",
            "context_management.edits.0.type",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            400,
            "invalid_request_error",
            "",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_anthropics_shape(
    server: RunningServer, change: Any, status: int, kind: str, says: str
) -> None:
    body = {name: value for name, value in {**ASK, **change}.items() if value is not None}
    with server.http() as http:
        answer = http.post("/v1/messages", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert error["type"] == "error" and error["error"]["type"] == kind
    assert says in error["error"]["message"]
    assert error["request_id"] == answer.headers["request-id"]


def test_keys_limits_and_a_full_queue_have_anthropics_types() -> None:
    keys = Keys()
    keys.add(KEY, Tenant("alice", KeyLimits(max_concurrent=1)))
    config = ServerConfig(keys=keys, limits=Limits(max_queue=1))
    with (
        running_server(server_config=config, context=4096) as server,
        connect(server) as client,
    ):
        with (
            connect(server, "wrong-key-0123456") as stranger,
            pytest.raises(anthropic.AuthenticationError, match="authentication_error"),
        ):
            stranger.messages.create(**CLIENT)
        assert client.messages.create(**CLIENT).content
        with (
            client.messages.stream(**LONG) as stream,
            pytest.raises(anthropic.RateLimitError, match="rate_limit_error"),
        ):
            next(iter(stream))
            client.messages.create(**CLIENT)
        metrics = httpx.get(f"{server.url}/metrics", headers={"x-api-key": KEY}).text
        assert 'path="/v1/messages"' in metrics


def test_a_client_that_goes_away_ends_its_request(client: anthropic.Anthropic, server: Any) -> None:
    aborted = server.service.metrics.requests_finished["abort"]
    with client.messages.stream(**LONG) as stream:
        next(event for event in stream if event.type == "content_block_delta")  # it runs
    wait_for(lambda: server.service.metrics.requests_finished["abort"] == aborted + 1)


# The shape of what Claude Code sends, with texts of our own.
@pytest.mark.parametrize("path", sorted(RECORDED.glob("claude_code_*.json")), ids=lambda p: p.stem)
def test_what_a_coding_agent_sends_is_answered(server: RunningServer, path: Path) -> None:
    recorded = json.loads(path.read_text())
    with server.http(headers=recorded["headers"]) as http:
        answer = http.post(recorded["path"], json=recorded["body"])
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-hotset-warning", "") == recorded["warning"]
    if recorded["body"].get("stream"):
        names = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
        assert names[:2] == ["message_start", "ping"] and names[-1] == "message_stop"
        assert "error" not in names


def turns(*messages: Json, system: Any = "") -> list[Json]:
    body = parse_body(CountTokensRequest, {"messages": list(messages), "system": system})
    return chat_messages(body.system, body.messages)


def test_blocks_become_messages_in_their_order() -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}
    text = {"type": "text", "text": "hm", "cache_control": {"type": "ephemeral"}}
    thought = {"type": "thinking", "thinking": "so", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [text, text]}
    failed = {**result, "content": "no", "is_error": True}
    function = {"name": "f", "arguments": '{"x": 1}'}
    assert turns(
        {"role": "user", "content": "one"},
        {"role": "user", "content": [text]},
        {"role": "assistant", "content": [thought, text, call]},
        {"role": "user", "content": [result, failed, text]},
        system=[text, text],
    ) == [
        {"role": "system", "content": "hm\n\nhm"},
        {"role": "user", "content": "one\n\nhm"},
        {
            "role": "assistant",
            "content": "hm",
            "reasoning_content": "so",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "hm\n\nhm"},
        {"role": "tool", "tool_call_id": "a", "content": "Error: no"},
        {"role": "user", "content": "hm"},
    ]


def test_the_billing_line_of_a_client_is_no_part_of_the_prompt(
    client: anthropic.Anthropic,
) -> None:
    def ask(nonce: str, of_list: bool) -> anthropic.types.Usage:
        billing = f"x-anthropic-billing-header: cc_version=2.1.177.01c; cch={nonce};"
        rules = "a long list of rules of the house " * 10
        system: Any = f"{billing}\n{rules}"
        if of_list:
            system = [{"type": "text", "text": billing}, {"type": "text", "text": rules}]
        return client.messages.create(**CLIENT, system=system).usage

    first, *later = ask("36ee5", True), ask("0aaa9", True), ask("11111", False)
    for usage in later:
        assert (usage.cache_read_input_tokens or 0) > 0.5 * first.input_tokens
    quoted = "about x-anthropic-billing-header: it stays"
    assert turns({"role": "user", "content": quoted}, system=quoted) == [
        {"role": role, "content": quoted} for role in ("system", "user")
    ]


@pytest.mark.parametrize(("kind", "switch"), [("disabled", False), ("adaptive", True)])
def test_thinking_is_the_templates_switch_and_said_where_it_is_on(kind: str, switch: bool) -> None:
    chat = parse_body(MessagesRequest, {**ASK, "thinking": {"type": kind}}).chat()
    assert chat.chat_template_kwargs == {"enable_thinking": switch}
    assert ("thoughts are a part of the text" in (chat.warning() or "")) == switch


class Chunks:
    """A writer whose chunks are given."""

    def __init__(self, deltas: list[Json], message: Json) -> None:
        self.deltas, self.message = deltas, message

    def chunk(self, output: RequestOutput) -> Json | None:
        return {"delta": self.deltas.pop(0), "finish_reason": None}

    def whole(self, completion: Completion) -> Json:
        return {"message": self.message}


def call(index: int, arguments: str, name: str | None = None) -> Json:
    function = {"arguments": arguments, **({"name": name} if name else {})}
    return {"index": index, "function": function, **({"id": f"call_{index}"} if name else {})}


def form_of(deltas: list[Json], message: Json | None = None) -> MessagesForm:
    body = parse_body(ChatRequest, {"messages": []})
    admitted = Admitted(body, "1", 3, [], [Chunks(deltas, message or {})])
    encoder: Any = None
    return MessagesForm([], encoder, admitted, "tiny")


def test_text_and_calls_are_blocks_of_their_own_and_arguments_stream() -> None:
    deltas = [
        {"role": "assistant", "content": "Let"},
        {"content": " me", "tool_calls": [call(0, "", "f")]},
        {"tool_calls": [call(0, '{"x":')]},
        {"tool_calls": [call(0, "1}"), call(1, "{", "g")]},
        {"content": "done", "tool_calls": [call(1, "}")]},
    ]
    form = form_of(list(deltas))
    output = RequestOutput("1", 0, "", (), None)
    text = form.begin() + "".join(form.step(0, output) for _ in deltas)
    text += form.end([Completion(finish_reason="stop", prompt_tokens=3)])
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    said = [
        (e["type"].removeprefix("content_block_"), e.get("index"), e.get("delta") or e.get(b))
        for e in events
        if (b := "content_block") and "block" in e["type"]
    ]
    start: Json = {"type": "tool_use", "input": {}}
    assert said == [
        ("start", 0, {"type": "text", "text": ""}),
        ("delta", 0, {"type": "text_delta", "text": "Let"}),
        ("delta", 0, {"type": "text_delta", "text": " me"}),
        ("stop", 0, None),
        ("start", 1, {**start, "id": "toolu_0", "name": "f"}),
        ("delta", 1, {"type": "input_json_delta", "partial_json": '{"x":'}),
        ("delta", 1, {"type": "input_json_delta", "partial_json": "1}"}),
        ("stop", 1, None),
        ("start", 2, {**start, "id": "toolu_1", "name": "g"}),
        ("delta", 2, {"type": "input_json_delta", "partial_json": "{"}),
        ("delta", 2, {"type": "input_json_delta", "partial_json": "}"}),
        ("stop", 2, None),
        ("start", 3, {"type": "text", "text": ""}),
        ("delta", 3, {"type": "text_delta", "text": "done"}),
        ("stop", 3, None),
    ]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert [e["type"] for e in events[:2]] == ["message_start", "ping"]


def test_a_call_that_was_cut_is_text_and_not_a_call_with_another_input() -> None:
    completion = Completion(finish_reason=FinishReason.LENGTH.value)
    for arguments in ('{"cit', '{"a": "\\ud83d', '{"a": "\\ud83d"}'):  # or no character
        message = {"content": None, "tool_calls": [call(0, arguments, "f")]}
        whole = form_of([], message).whole([completion])
        text = f'{{"name": "f", "arguments": {arguments}'
        assert whole["content"] == [{"type": "text", "text": text}]
        assert whole["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OverloadedError("too many wait", 3), 529, "overloaded_error"),
        (EngineError("loading"), 503, "api_error"),
        (RequestError("no"), 400, "invalid_request_error"),
        (ApiError(504, "late"), 504, "timeout_error"),
        (ApiError(405, "no"), 405, "invalid_request_error"),
    ],
)
def test_an_error_has_the_type_that_clients_look_for(
    error: HotsetError, status: int, kind: str
) -> None:
    code, body = messages_error(as_api_error(error), "r")
    assert (code, body["error"]["type"], body["request_id"]) == (status, kind, "r")


def test_a_stream_that_fails_ends_with_an_error_event() -> None:
    error = ApiError(500, "the step failed", kind="server_error")
    said = form_of([]).failure(error)
    data = {"type": "error", "error": {"type": "api_error", "message": "the step failed"}}
    assert said.startswith("event: error\n") and json.loads(said.split("data: ")[1]) == data
