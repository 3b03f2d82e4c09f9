"""The OpenAI Responses API, by the official client and by what a coding agent sends."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from servers import CHAT, KEY, RunningServer, running_server, wait_for

from hotset.engine.completion import Completion
from hotset.request import RequestOutput
from hotset.server.admission import Admitted
from hotset.server.app import ServerConfig
from hotset.server.body import Json, parse_body
from hotset.server.errors import ApiError
from hotset.server.keys import Keys, Tenant
from hotset.server.limits import Limits
from hotset.server.response_store import ResponseStore
from hotset.server.responses_body import ResponsesRequest, chat_messages
from hotset.server.responses_form import ResponsesForm
from hotset.server.schemas import ChatRequest

BOB = "sk-bob-9876543210"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "of a place",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 4}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
ASK: dict[str, Any] = {
    "model": "tiny",
    "input": "the cat",
    "temperature": 0,
    "max_output_tokens": 6,
}
RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    keys = Keys()
    keys.add(KEY, Tenant("alice"))
    keys.add(BOB, Tenant("bob"))
    config = ServerConfig(keys=keys, limits=Limits(max_stored=3))
    with running_server(server_config=config, context=4096) as running:
        yield running


def post(server: RunningServer, body: Json) -> Any:
    with server.http(headers={"authorization": f"Bearer {KEY}"}) as http:
        return http.post("/v1/responses", content=json.dumps(body))


def chat_text(client: openai.OpenAI, **change: Any) -> str | None:
    answer = client.chat.completions.create(model="tiny", **{**CHAT, **change})
    return answer.choices[0].message.content


def test_a_response_has_the_text_of_the_chat(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASK)
    assert response.output_text == chat_text(client)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    usage = response.usage
    assert usage is not None and usage.output_tokens == 6
    assert usage.total_tokens == usage.input_tokens + 6
    again = client.responses.create(**{**ASK, "input": "a dog and a cat " * 20}).usage
    again = client.responses.create(**{**ASK, "input": "a dog and a cat " * 20}).usage
    assert again is not None and 0 < again.input_tokens_details.cached_tokens < again.input_tokens


def test_instructions_and_items_are_the_messages_of_a_chat(client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "developer", "content": "in French"},
        {"role": "user", "content": [{"type": "input_text", "text": "the cat"}]},
    ]
    response = client.responses.create(**{**ASK, "input": items}, instructions="be brief")
    system = {"role": "system", "content": "be brief\n\nin French"}
    messages = [system, *CHAT["messages"]]
    assert response.output_text == chat_text(client, messages=messages)


def test_a_stream_has_its_events_in_order_and_ends_with_the_whole_response(
    client: openai.OpenAI,
) -> None:
    whole = client.responses.create(**ASK)
    events: list[Any] = list(client.responses.create(**ASK, stream=True))
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert final.output_text == whole.output_text
    assert final.usage is not None and final.usage.output_tokens == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_taken(client: openai.OpenAI, stream: bool) -> None:
    ask: Any = {**ASK, "max_output_tokens": 120, "temperature": 1, "tools": [WEATHER]}
    ask |= {"tool_choice": "required", "parallel_tool_calls": False}
    if stream:
        with client.responses.stream(**ask) as events:
            kinds = [event.type for event in events]
            response: Any = events.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        assert kinds[-1] == "response.completed"
    else:
        response = client.responses.create(**ask)
    [call] = response.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert len(json.loads(call.arguments)["place"]) <= 4
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    history: Any = [
        {"role": "user", "content": "How is it?"},
        call.model_dump(exclude={"parsed_arguments"}),
        result,
    ]
    answer = client.responses.create(**{**ask, "tool_choice": "auto", "input": history})
    assert answer.output_text


class Place(pydantic.BaseModel):
    kind: Literal["town", "hill"]


def test_structured_output_is_parsed_by_the_client(client: openai.OpenAI) -> None:
    ask = {**ASK, "max_output_tokens": 60, "temperature": 1}
    response = client.responses.parse(text_format=Place, **ask)
    assert isinstance(response.output_parsed, Place) and response.status == "completed"
    form: Any = {"format": {"type": "json_object"}}
    text = client.responses.create(**{**ask, "temperature": 0, "text": form}).output_text
    assert text.startswith("{")


def test_logprobs_come_with_the_text(client: openai.OpenAI) -> None:
    response: Any = client.responses.create(**ASK, top_logprobs=2)
    [part] = response.output[0].content
    assert len(part.logprobs) == 6
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    include: Any = ["message.output_text.logprobs"]
    events: Any = list(client.responses.create(**ASK, include=include, stream=True))
    [done] = [event for event in events if event.type == "response.output_text.done"]
    assert [entry.logprob for entry in done.logprobs] == [one.logprob for one in part.logprobs]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    first = [entry.token for event in deltas for entry in event.logprobs]
    assert first and first == [entry.token for entry in done.logprobs[: len(first)]]


def test_a_response_is_stored_only_if_asked_and_for_its_key_only(
    server: RunningServer, client: openai.OpenAI
) -> None:
    kept = client.responses.create(**ASK, store=True)
    lost = client.responses.create(**ASK)
    assert client.responses.retrieve(kept.id).output_text == kept.output_text
    with server.openai(BOB) as bob:
        for who, response_id in ((client, lost.id), (bob, kept.id)):
            with pytest.raises(openai.NotFoundError, match="store is true"):
                who.responses.retrieve(response_id)
            with pytest.raises(openai.BadRequestError) as refused:
                who.responses.create(**ASK, previous_response_id=response_id)
            assert refused.value.code == "previous_response_not_found"
    client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept.id)


def test_a_conversation_goes_on_from_a_stored_response(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASK, store=True, instructions="forgotten afterwards")
    ask = {**ASK, "input": "a dog", "previous_response_id": first.id}
    second: Any = [*client.responses.create(**ask, store=True, stream=True)][-1]
    second = second.response
    third = client.responses.create(**{**ASK, "input": "so?", "previous_response_id": second.id})
    turns = ["the cat", first.output_text, "a dog", second.output_text, "so?"]
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    assert third.output_text == chat_text(client, messages=messages)
    assert third.previous_response_id == second.id


def test_the_oldest_of_too_many_are_dropped(client: openai.OpenAI) -> None:
    ids = [client.responses.create(**ASK, store=True).id for _ in range(4)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ids[0])
    assert [client.responses.retrieve(one).id for one in ids[1:]] == ids[1:]


def test_the_store_is_bounded_in_bytes() -> None:
    async def main() -> None:
        store = ResponseStore(max_count=100, max_bytes=1000)
        for i in range(5):
            assert await store.put("a", {"id": f"resp_{i}", "output": "x" * 300}, [])
        assert await store.put("b", {"id": "resp_0"}, [])
        assert not await store.put("a", {"id": "resp_9"}, [{"text": "x" * 1000}])
        for name in ("resp_0", "resp_1", "resp_9"):
            with pytest.raises(ApiError, match="there is no response"):
                await store.get("a", name)
        names = ["resp_2", "resp_3", "resp_4"]
        assert [(await store.get("a", name)).response["id"] for name in names] == names
        assert await store.get("b", "resp_0")
        await store.delete("a", "resp_3")
        assert await store.put("a", {"id": "resp_5", "output": "x" * 300}, [])
        assert await store.get("a", "resp_2")  # there was room

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"input": None}, "input", "input is missing"),
        ({"input": []}, "input", "input is empty"),
        ({"input": 5}, "input", "input is 5; expected a string or a list"),
        ({"input": [{"content": "a"}]}, "input.0.role", "input.0.role is missing"),
        (
            {"input": [{"type": "item_reference", "id": "a"}]},
            "input.0.type",
            "input.0.type is \"item_reference\"; expected 'message', 'function_call'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
            "is \"input_image\"; expected 'input_text'",
        ),
        ({"background": True}, "background", "background is true; expected false"),
        ({"conversation": "a"}, "conversation", "conversation is not supported"),
        ({"truncation": "auto"}, "truncation", "expected 'disabled'"),
        ({"prompt": {"id": "a"}}, "prompt", "prompt is not supported"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "expected 'medium'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "text.format",
            "",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "expected 1 or more"),
        ({"temperature": 1e9}, "temperature", "temperature is"),
        ({"tool_choice": "required"}, "tool_choice", "no tools to call"),
        (
            {"tools": [{"type": "web_search"}], "tool_choice": "required"},
            "tool_choice",
            'tools of type "web_search" are skipped',
        ),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "expected 'function'"),
        ({"input": "a " * 5000}, "input", "longest context"),
        ({"model": "gpt"}, "model", "not served here"),
        (
            {
                "tool_choice": "none",
                "tools": [{"type": "function", "name": "f", "parameters": {"\ud800": 1}}],
            },
            None,
            "the body is not valid Unicode",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(
    server: RunningServer, change: Any, param: str | None, says: str
) -> None:
    body = {name: value for name, value in {**ASK, **change}.items() if value is not None}
    answer = post(server, body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["param"] == param and error["code"]


def test_a_client_that_goes_away_ends_its_request(
    server: RunningServer, client: openai.OpenAI
) -> None:
    aborted = server.service.metrics.requests_finished["abort"]
    form: Any = {"format": {"type": "json_schema", "name": "long", "schema": {"minLength": 9000}}}
    form["format"]["schema"]["type"] = "string"
    ask = {**ASK, "max_output_tokens": 3900}
    with client.responses.stream(**ask, text=form) as stream:
        next(event for event in stream if event.type == "response.output_text.delta")  # it runs
    wait_for(lambda: server.service.metrics.requests_finished["abort"] == aborted + 1)


# The shape of what Codex sends, with texts of our own.
@pytest.mark.parametrize("path", sorted(RECORDED.glob("codex_*.json")), ids=lambda p: p.stem)
def test_what_a_coding_agent_sends_is_answered(server: RunningServer, path: Path) -> None:
    recorded = json.loads(path.read_text())
    headers = {**recorded["headers"], "authorization": f"Bearer {KEY}"}
    with server.http(headers=headers) as http:
        answer = http.post(recorded["path"], json=recorded["body"])
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-hotset-warning", "") == recorded["warning"]
    kinds = [line[7:] for line in answer.text.splitlines() if line.startswith("event: ")]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_items_become_messages_and_a_turns_calls_are_one() -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "id": "fc_1"}
    result = {"type": "function_call_output", "call_id": "a"}
    answer = {"type": "output_text", "text": "hm", "annotations": []}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    items: list[Any] = [
        {"role": "user", "content": "one"},
        thought,
        {"type": "message", "role": "assistant", "content": [answer], "status": "completed"},
        call,
        {**call, "call_id": "b"},
        {**result, "output": "1"},
        {**result, "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
        {**call, "call_id": "c", "arguments": '{"cit'},
    ]
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": one, "type": "function", "function": function} for one in "abc"]
    calls[2] = {**calls[2], "function": {"name": "f", "arguments": '{"cit'}}
    request = parse_body(ResponsesRequest, {"input": items})
    assert chat_messages("be brief", request.items()) == [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "hm", "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "assistant", "content": None, "tool_calls": calls[2:]},
    ]


class Chunks:
    """A writer whose chunks are given."""

    def __init__(self, deltas: list[Json]) -> None:
        self.deltas = deltas

    def chunk(self, output: RequestOutput) -> Json | None:
        return {"delta": self.deltas.pop(0)}

    def whole(self, completion: Completion) -> Json:
        raise NotImplementedError

    def beside(self, completions: Any) -> Json:
        return {}


def call(index: int, arguments: str, name: str | None = None) -> Json:
    function = {"arguments": arguments, **({"name": name} if name else {})}
    return {"index": index, "function": function, **({"id": f"call_{index}"} if name else {})}


def test_text_and_calls_are_items_of_their_own_and_arguments_stream() -> None:
    deltas = [
        {"content": "Let", "tool_calls": [call(0, "", "f")]},
        {"tool_calls": [call(0, '{"x":')]},
        {"tool_calls": [call(0, "1}"), call(1, "{", "g")]},
        {"content": "done", "tool_calls": [call(1, "}")]},
    ]
    stored: list[Json] = []
    chat = parse_body(ChatRequest, {"messages": []})
    admitted = Admitted(chat, "1", 3, [], [Chunks(list(deltas))])
    body = parse_body(ResponsesRequest, {"input": "a", "store": True, "stream": True})

    async def keep(response: Json) -> bool:
        stored.append(response)
        return True

    form = ResponsesForm(body, keep, admitted, "tiny")
    output = RequestOutput("1", 0, "", (), None)
    text = form.begin() + "".join(form.step(0, output) for _ in deltas)
    ended = [Completion(finish_reason="stop", prompt_tokens=3)]
    asyncio.run(form.settle(ended))
    text += form.end(ended)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    args = "function_call_arguments"
    assert [
        (e["type"].removeprefix("response."), e.get("output_index"), e.get("delta")) for e in events
    ] == [
        ("created", None, None),
        ("in_progress", None, None),
        ("output_item.added", 0, None),
        ("content_part.added", 0, None),
        ("output_text.delta", 0, "Let"),
        ("output_text.done", 0, None),
        ("content_part.done", 0, None),
        ("output_item.done", 0, None),
        ("output_item.added", 1, None),
        (f"{args}.delta", 1, '{"x":'),
        (f"{args}.delta", 1, "1}"),
        (f"{args}.done", 1, None),
        ("output_item.done", 1, None),
        ("output_item.added", 2, None),
        (f"{args}.delta", 2, "{"),
        (f"{args}.delta", 2, "}"),
        (f"{args}.done", 2, None),
        ("output_item.done", 2, None),
        ("output_item.added", 3, None),
        ("content_part.added", 3, None),
        ("output_text.delta", 3, "done"),
        ("output_text.done", 3, None),
        ("content_part.done", 3, None),
        ("output_item.done", 3, None),
        ("completed", None, None),
    ]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    response = events[-1]["response"]
    kinds = ["message", "function_call", "function_call", "message"]
    assert [item["type"] for item in response["output"]] == kinds
    assert [item["status"] for item in response["output"]] == ["completed"] * 4
    assert response["output"][1]["arguments"] == '{"x":1}'
    assert stored == [response] and response["store"] is True


def test_a_stream_that_fails_says_so_in_its_last_event() -> None:
    chat = parse_body(ChatRequest, {"messages": []})
    body = parse_body(ResponsesRequest, {"input": "a"})
    form = ResponsesForm(body, None, Admitted(chat, "1", 3, [], [Chunks([])]), "tiny")
    said = form.failure(ApiError(500, "the step failed", kind="server_error"))
    data = json.loads(said.split("data: ")[1])
    assert data["type"] == "response.failed" and data["response"]["status"] == "failed"
    assert data["response"]["error"]["message"] == "the step failed"
