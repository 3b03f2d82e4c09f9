"""The API as its clients see it: the official client, and what HTTP says when things are wrong."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from click.testing import CliRunner
from servers import CHAT, KEY, RunningServer, running_server, wait_for

import hotset
from hotset.cli.serve import command as serve_command
from hotset.engine.output_stream import OutputStream
from hotset.errors import ConfigError
from hotset.executor.sampler import PendingTokens, Sampler
from hotset.executor.step_input import SampleInput
from hotset.request import RequestOutput
from hotset.server.app import ServerConfig
from hotset.server.keys import Keys, Tenant

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 4}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = ServerConfig(files_path=tmp_path_factory.mktemp("files"))
    with running_server(server_config=config) as running:
        yield running


def test_the_official_client_lists_and_describes_the_model(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("other/model")


def test_a_chat_stream_has_the_text_and_usage_of_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", **CHAT)
    stream = client.chat.completions.create(
        model="tiny", stream=True, stream_options={"include_usage": True}, **CHAT
    )
    chunks = list(stream)
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 6
    assert whole._request_id


def test_completions_answer_every_prompt_n_times_in_order(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["the cat", "a dog"],
        "n": 2,
        "temperature": 0,
        "max_tokens": 4,
        "echo": True,
    }
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in whole.choices]
    assert texts[0] == texts[1] and texts[0].startswith("the cat") and texts[0] != "the cat"
    assert texts[2] == texts[3] and texts[2].startswith("a dog")
    streamed = [""] * 4
    for chunk in client.completions.create(stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_logprobs_seed_stop_and_penalties_do_what_they_say(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    messages: Any = CHAT["messages"]
    hot: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 1.5}
    twice = [create(max_tokens=12, seed=7, **hot).choices[0].message.content for _ in range(2)]
    assert twice[0] == twice[1]
    other = create(max_tokens=12, seed=8, **hot).choices[0].message.content
    assert other != twice[0]

    answer = create(model="tiny", logprobs=True, top_logprobs=3, **CHAT).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    assert len(answer.logprobs.content) == 6
    for entry in answer.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # greedy

    text = answer.message.content
    assert text is not None
    stopped = create(model="tiny", stop=[text[3:5]], **CHAT).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(text[3:5])]

    long: dict[str, Any] = {**CHAT, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    plain = create(model="tiny", **long).choices[0].message.content
    varied = create(model="tiny", frequency_penalty=2.0, **long).choices[0].message.content
    assert plain is not None and varied is not None
    assert len(set(varied)) > len(set(plain)) or varied != plain


def test_a_json_schema_is_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT["messages"],  # type: ignore[arg-type]
        temperature=1,
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert 0 <= json.loads(answer.choices[0].message.content or "")["age"] <= 99


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_forced_tool_is_called_with_arguments_of_its_schema(
    client: openai.OpenAI, stream: bool, choice: Any
) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": CHAT["messages"],
        "temperature": 1,
        "max_tokens": 120,
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **options))
        [first, *more] = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert {call.index for call in (first, *more)} == {0}
        assert {(call.id, call.function.name, call.type) for call in more} == {(None,) * 3}
        assert len(more) > 1  # the arguments come as they grow
        first.function.arguments += "".join(call.function.arguments for call in more)
        calls: Any = [first]
        assert not any(c.choices[0].delta.content for c in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**options).choices[0]
        calls, reason = answer.message.tool_calls, answer.finish_reason
        assert answer.message.content is None
    assert calls[0].function.name == "weather" and calls[0].id.startswith("call_")
    assert len(json.loads(calls[0].function.arguments)["place"]) <= 4
    assert reason == ("tool_calls" if choice == "required" else "stop")


def test_a_conversation_with_tool_results_is_taken(client: openai.OpenAI) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages: Any = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,
        tools=[TOOL],
        max_tokens=4,  # type: ignore[list-item]
    )
    assert answer.usage is not None and answer.usage.completion_tokens >= 1


def test_a_batch_goes_through_files_to_files(client: openai.OpenAI) -> None:
    body = {"model": "tiny", **CHAT}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [{"custom_id": str(i), **line} for i in range(5)]
    lines[3] = {**lines[3], "body": {"messages": []}}
    texts = [json.dumps(line) for line in lines]
    texts[1] = texts[1].replace('"messages": [', '"messages": [' + "[" * 100_000)
    content = "\n".join(texts).encode()
    source = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert client.files.content(source.id).content == content

    batch = client.batches.create(
        input_file_id=source.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"for": "test"},
    )

    def done() -> bool:
        return client.batches.retrieve(batch.id).status == "completed"

    wait_for(done)
    batch = client.batches.retrieve(batch.id)
    assert batch.request_counts is not None and batch.output_file_id is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 2)
    records = [
        json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()
    ]
    assert [record["custom_id"] for record in records] == ["0", None, "2", "3", "4"]
    whole = client.chat.completions.create(model="tiny", **CHAT).choices[0].message.content
    assert records[0]["response"]["body"]["choices"][0]["message"]["content"] == whole
    assert next(batch.id for batch in client.batches.list(limit=1)) == batch.id
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    client.files.delete(source.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(source.id)


def test_a_tool_of_a_type_that_is_not_known_is_skipped_with_a_warning(
    server: RunningServer,
) -> None:
    other = [{"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}]
    warning = 'tools of type "web_search", "custom" are skipped: functions are the only type here'
    with server.http() as http:

        def ask(**body: Any) -> httpx.Response:
            return http.post("/v1/chat/completions", json={**CHAT, **body})

        only = ask(tools=[TOOL])
        for stream in (False, True):
            mixed = ask(tools=[*other, TOOL], stream=stream)
            assert mixed.status_code == 200
            assert mixed.headers["x-hotset-warning"] == warning
        assert "x-hotset-warning" not in only.headers
        mixed = ask(tools=[other[0], TOOL, other[1]])
        assert mixed.json()["choices"] == only.json()["choices"]
        assert mixed.json()["usage"]["prompt_tokens"] == only.json()["usage"]["prompt_tokens"]

        formed = ask(tools=[TOOL], response_format={"type": "json_object"})
        assert formed.headers["x-hotset-warning"].startswith("no tool can be called")

        refused = ask(tools=other, tool_choice="required")
        assert refused.status_code == 400
        assert "no tools to call; tools of type" in refused.json()["error"]["message"]
        refused = ask(tools=other, tool_choice={"type": "web_search"})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "tool_choice.type")
        assert "\"web_search\"; expected 'function'" in error["message"]
        error = ask(tools=[other[0], {"type": "function"}]).json()["error"]
        assert error["message"] == "tools.1.function is missing"
        assert error["param"] == "tools.1.function"


def test_a_404_says_what_there_is(server: RunningServer) -> None:
    with server.http() as http:
        message = http.post("/v1/chat", json={}).json()["error"]["message"]
        assert message.startswith("there is no /v1/chat; there are /v1/chat/completions, /v1/")
        assert "/v1/models" in message and "/health" in message
        assert http.get("/version").json() == {"version": hotset.__version__}


def test_a_page_of_an_origin_that_is_allowed_can_use_the_server(tmp_path: Path) -> None:
    page, other = "https://chat.example.org", "https://other.example.org"
    keys = Keys()
    keys.add(KEY, Tenant("alice"))
    config = ServerConfig(keys=keys, cors_origins=[page])
    asks = {"access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization, content-type"
    path = "/v1/chat/completions"
    with running_server(server_config=config) as server, server.http() as http:
        leave = http.options(path, headers={"origin": page, **asks})
        assert leave.status_code == 200
        assert leave.headers["access-control-allow-origin"] == page
        assert "authorization" in leave.headers["access-control-allow-headers"]
        assert http.options(path, headers={"origin": other, **asks}).status_code == 400
        key = {"authorization": f"Bearer {KEY}"}
        for headers, status in (({**key, "origin": page}, 200), ({"origin": page}, 401)):
            answer = http.post(path, json=CHAT, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == page
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        answer = http.post(path, json=CHAT, headers={**key, "origin": other})
        assert "access-control-allow-origin" not in answer.headers


def test_without_the_option_no_page_of_another_origin_can(server: RunningServer) -> None:
    with server.http() as http:
        asks = {"origin": "https://a.example.org", "access-control-request-method": "POST"}
        assert http.options("/v1/chat/completions", headers=asks).status_code == 405
        answer = http.get("/health", headers=asks)
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["example.org", "https://a.org/", "null", "https://a.org/x"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    done = CliRunner().invoke(serve_command, ["--cors-origin", origin])
    assert isinstance(done.exception, ConfigError)
    assert "is no origin; expected SCHEME://HOST" in str(done.exception)


def test_tokenize_and_detokenize_are_each_others_inverse(server: RunningServer) -> None:
    with server.http() as http:
        ids = http.post("/tokenize", json={"prompt": "the cat sat"}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "the cat sat"}
        chat = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()
        text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
        assert text == "<user>the cat<eos><assistant>"
        assert http.post("/detokenize", json={"tokens": [2**40]}).status_code == 400
        assert http.post("/tokenize", json={}).status_code == 400


DEEP: Any = {}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("{", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        ("[" * 100_000, 400, "too deeply"),
        ("9" * 10_000, 400, "JSON"),
        ([], 400, "expected an object"),
        ({}, 400, "messages is missing"),
        ({**CHAT, "temperature": "hot"}, 400, "temperature"),
        ({**CHAT, "temperature": 1e9}, 400, "temperature"),
        ({**CHAT, "logit_bias": {"5": 1000}}, 400, "logit_bias of token 5 is 1000"),
        ({**CHAT, "best": 1}, 400, "best is not supported"),
        ({**CHAT, "tools": [1]}, 400, "tools.0"),
        ({**CHAT, "tool_choice": "required"}, 400, "no tools"),
        ({**CHAT, "model": "other"}, 404, "not served"),
        ({**CHAT, "messages": [{"role": "user"}]}, 400, "content"),
        ({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "Unicode"),
        ({**CHAT, "messages": [{"role": "user", "content": "a " * 2000}]}, 400, "longest context"),
        ({**CHAT, "n": 17}, 400, "n is 17"),
        ({**CHAT, "stop": ["a"] * 17}, 400, "stops"),
        ({**CHAT, "seed": 2**70}, 200, ""),
        ({**CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400, "cannot set"),
        (
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
            400,
            "depth",
        ),
        (
            {
                **CHAT,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"$ref": "#"}},
                },
            },
            400,
            "no value can fit",
        ),
        (
            {
                **CHAT,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"enum": ["x" * 1000] * 70}},
                },
            },
            400,
            "size",
        ),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 5_000_000}]}, 413, "larger"),
    ],
)
def test_a_bad_request_is_answered_with_what_is_wrong(
    server: RunningServer, body: Any, status: int, says: str
) -> None:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    with server.http() as http:
        response = http.post("/v1/chat/completions", content=content)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert says in error["message"]
        assert error["code"] and error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("chat/completions", {"n": 17}, "n", "invalid_value"),
        ("chat/completions", {"temperature": 1e9}, "temperature", "invalid_value"),
        ("chat/completions", {"stop": ["a"] * 17}, "stop", "invalid_value"),
        ("chat/completions", {"best": 1}, "best", "unsupported_parameter"),
        ("chat/completions", {"model": "other"}, "model", "model_not_found"),
        ("chat/completions", {"messages": []}, "messages", "invalid_value"),
        ("chat/completions", {"messages": [{"role": "a"}]}, "messages.0", "invalid_value"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a " * 2000}]},
            "messages",
            "context_length_exceeded",
        ),
        ("completions", {"prompt": "a " * 2000}, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": [2**30]}, "prompt", "invalid_value"),
        (
            "chat/completions",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "x"}},
                }
            },
            "response_format",
            "invalid_value",
        ),
    ],
)
def test_an_error_names_the_field_and_has_a_code_for_programs(
    server: RunningServer, path: str, body: Any, param: str, code: str
) -> None:
    base = CHAT if path.startswith("chat") else {}
    with server.http() as http:
        error = http.post(f"/v1/{path}", json={**base, **body}).json()["error"]
    assert (error["param"], error["code"]) == (param, code)


def test_a_body_without_a_length_is_bounded_too(server: RunningServer) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 65536

    with server.http() as http:
        assert http.post("/v1/completions", content=chunks()).status_code == 413


def test_paths_and_methods_that_are_not_there_are_json_errors(server: RunningServer) -> None:
    with server.http() as http:
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", "/v1/chat/completions", 405),
            ("GET", "/v1/files/file-1", 404),
            ("GET", "/v1/files/..%2f..%2fetc%2fpasswd", 404),
            ("GET", "/v1/files?limit=x", 400),
            ("POST", "/v1/files", 400),
        ):
            response = http.request(method, path)
            assert response.status_code == status, path
            assert response.json()["error"]["message"] and response.json()["error"]["code"]
            assert response.headers["x-request-id"]


def test_an_id_of_the_client_comes_back_unless_it_is_a_bad_one(server: RunningServer) -> None:
    with server.http() as http:
        health = http.get("/health", headers={"x-request-id": "mine-1"})
        assert health.headers["x-request-id"] == "mine-1"
        health = http.get("/health", headers={"x-request-id": "a b"})
        assert health.headers["x-request-id"] != "a b"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_blocks(server: RunningServer, stream: bool) -> None:
    aborted = server.service.metrics.requests_finished["abort"]
    body = json.dumps({**CHAT, "max_tokens": 480, "ignore_eos": True, "stream": stream}).encode()
    tokens = server.service.metrics.output_tokens
    client = socket.create_connection(("127.0.0.1", server.port))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
    client.sendall(head % len(body) + body)
    wait_for(lambda: server.service.metrics.output_tokens > tokens + 3)
    client.close()
    wait_for(lambda: server.service.metrics.requests_finished["abort"] == aborted + 1)
    status = server.service.status().result(60)
    assert status.num_moving == 0
    assert not set(status.tiers[0].cells) & set("hs")


def test_the_metrics_count_what_was_served(server: RunningServer, client: openai.OpenAI) -> None:
    def value(name: str) -> float:
        with server.http() as http:
            text = http.get("/metrics").text
        [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[-1])

    tokens, firsts = "hotset:generation_tokens_total", "hotset:time_to_first_token_seconds_count"
    before = value(tokens), value(firsts)
    client.chat.completions.create(model="tiny", **CHAT)  # type: ignore[arg-type]
    assert (value(tokens), value(firsts)) == (before[0] + 6, before[1] + 1)


def test_the_status_says_what_is_where(server: RunningServer, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="tiny", **CHAT)  # type: ignore[arg-type]
    with server.http() as http:
        status = http.get("/status.json").json()
        for page in ("/", "/docs"):
            text = http.get(page).text
            assert "hotset" in text
            assert "http://" not in text and "https://" not in text  # works offline
        paths = http.get("/openapi.json").json()["paths"]
    assert status["engine"]["tiers"][0]["name"] == "device"
    assert status["totals"]["output_tokens"] >= 6
    assert status["latency_s"]["ttft"]["p50"] > 0
    assert "/v1/chat/completions" in paths


def test_an_answer_that_was_cut_off_by_its_deadline_says_so(server: RunningServer) -> None:
    body = {**CHAT, "max_tokens": 480, "ignore_eos": True, "timeout_s": 0.05}
    with server.http() as http:
        whole = http.post("/v1/chat/completions", json=body)
        assert whole.status_code == 504
        assert "0.05 s" in whole.json()["error"]["message"]
        stream = http.post("/v1/chat/completions", json={**body, "stream": True})
    last = stream.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"


def test_the_http_client_sees_no_trace_of_a_bug(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr("hotset.server.metrics.exposition", fail)
    with server.http() as http:
        response: httpx.Response = http.get("/metrics")
    assert response.status_code == 500
    assert "secret" not in response.text and "Traceback" not in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


def test_an_answer_whose_logits_are_no_numbers_is_an_error_and_its_neighbour_goes_on(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Sampler.submit

    def poison(self: Sampler, logits: torch.Tensor, sample: SampleInput) -> PendingTokens:
        """The third token of each request that draws."""
        rows = [
            row
            for row, (one, num) in enumerate(zip(sample.sequences, sample.num_outputs, strict=True))
            if one.params.temperature and num == 2
        ]
        logits = logits.clone()
        logits[rows] = torch.nan
        return submit(self, logits, sample)

    put = OutputStream.put

    def wake_at_the_end(self: OutputStream, output: RequestOutput) -> Any:
        """All outputs wait for their reader, joined to one."""
        reader = put(self, output)
        return None if output.finish_reason is None else reader

    body = {**CHAT, "ignore_eos": True}
    with server.http() as http, ThreadPoolExecutor() as pool:
        wanted = http.post("/v1/chat/completions", json=body).json()["choices"]
        monkeypatch.setattr(Sampler, "submit", poison)
        neighbour = pool.submit(http.post, "/v1/chat/completions", json=body)
        drawn = {**body, "temperature": 1, "seed": 3}
        whole = http.post("/v1/chat/completions", json=drawn)
        assert neighbour.result().json()["choices"] == wanted
        stream = http.post("/v1/chat/completions", json={**drawn, "stream": True})
        monkeypatch.setattr(OutputStream, "put", wake_at_the_end)
        slow = http.post("/v1/chat/completions", json={**drawn, "stream": True})
    assert whole.status_code == 500
    error = whole.json()["error"]
    assert error["code"] == "step_failed" and "NaN or infinite" in error["message"]
    texts = []
    for answer in (stream, slow):
        *parts, last = (json.loads(one[6:]) for one in answer.text.strip().split("\n\n"))
        assert last["error"] == error
        choices = [part["choices"][0] for part in parts]
        assert all(choice["finish_reason"] is None for choice in choices)
        texts.append("".join(choice["delta"].get("content", "") for choice in choices))
    assert texts[0] == texts[1] != ""  # what came before
