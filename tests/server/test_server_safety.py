"""Keys, limits of keys, whose prefixes are whose, names, and no 5xx whatever is sent."""

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    status_code_conformance,
)
from servers import CHAT, KEY, RunningServer, running_server

from hotset.errors import ConfigError
from hotset.server.app import ServerConfig
from hotset.server.keys import Keys
from hotset.server.limits import Limits

CHECKS = [not_a_server_error, content_type_conformance, status_code_conformance]
BOB = "sk-bob-0123456789"
PROMPT = "the cat sat on the mat and the dog sat by the door " * 3


def make_keys(path: Path) -> Keys:
    path.write_text(
        f'[keys.alice]\nkey = "{KEY}"\n'
        f'[keys.bob]\nkey = "{BOB}"\nrequests_per_minute = 3\nmax_concurrent = 1\n'
    )
    keys = Keys()
    keys.read_file(path)
    return keys


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[RunningServer]:
    config = ServerConfig(keys=make_keys(tmp_path / "keys.toml"), files_path=tmp_path / "files")
    with running_server(server_config=config) as running:
        yield running


def test_without_a_key_only_what_tells_nothing_is_answered(guarded: RunningServer) -> None:
    with guarded.http() as http:
        for path in ("/", "/docs", "/openapi.json", "/health", "/version"):
            assert http.get(path).status_code == 200, path
        for path in ("/metrics", "/status.json", "/v1/models", "/v1/files", "/nothing"):
            response = http.get(path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
        for bad in ("Bearer nobody-knows-this-one", f"Basic {KEY}", "Bearer", f"Bearer {KEY[:-1]}"):
            assert http.get("/v1/models", headers={"authorization": bad}).status_code == 401
        for header, value in (("authorization", f"bearer {KEY}"), ("x-api-key", KEY)):
            assert http.get("/v1/models", headers={header: value}).status_code == 200
        assert http.get("/v1/models", headers={"x-api-key": KEY[:-1]}).status_code == 401


def test_a_key_is_in_no_log_line(guarded: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), guarded.openai() as client:
        client.completions.create(model="tiny", prompt="a secret text", max_tokens=2)
    said = [str(vars(record)) for record in caplog.records if record.name.startswith("hotset")]
    assert any("'key': 'alice'" in line for line in said)
    assert not any(KEY in line or "secret text" in line for line in said)


def test_a_key_finds_its_own_prefixes_and_nobody_elses(guarded: RunningServer) -> None:
    def cached(key: str, **extra: Any) -> int:
        with guarded.openai(key) as client:
            answer = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=1, extra_body=extra
            )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(BOB) == 0
    assert cached(KEY, cache_salt="user-1") == 0
    # One key's salt must not spell the chain of another's.
    assert cached(KEY, cache_salt="key:bob\0") == 0


def test_a_key_sees_its_own_files_only(guarded: RunningServer) -> None:
    with guarded.openai() as alice, guarded.openai(BOB) as bob:
        file = alice.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
        assert [one.id for one in alice.files.list()] == [file.id]
        assert list(bob.files.list()) == []
        with pytest.raises(openai.NotFoundError):
            bob.files.content(file.id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(
                input_file_id=file.id,
                endpoint="/v1/completions",
                completion_window="24h",
            )


def test_a_keys_limits_hold_and_say_when_to_come_back(guarded: RunningServer) -> None:
    with guarded.openai(BOB) as client:
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 requests open"):
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
        stream.close()
        for _ in range(200):  # until the server has seen it closed
            try:
                client.completions.create(model="tiny", prompt="a", max_tokens=1)
            except openai.RateLimitError as error:
                if "open" in str(error):
                    continue
                assert int(error.response.headers["retry-after"]) >= 1
                break
        else:
            raise AssertionError("four requests went through in a minute that had three")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no keys"),
        ("[keys]\n", "no keys"),
        ("[keys.a]\n", "needs either"),
        ('[keys.a]\nkey = "short"\n', "at least 16"),
        ('[keys."../a"]\nkey = "0123456789abcdef"\n', "cannot name"),
        ('[keys.a]\nsha256 = "12"\n', "64 hex"),
        ('[keys.a]\nkey = "0123456789abcdef"\nmax_concurrent = 0\n', "max_concurrent"),
        ('[keys.a]\nkey = "0123456789abcdef"\nrate = 1\n', "unknown"),
        ('[keys.a]\nkey = "0123456789abcdef"\n[keys.b]\nkey = "0123456789abcdef"\n', "another"),
        ("keys = 1\n[[", "not TOML"),
    ],
)
def test_a_key_file_that_cannot_work_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        Keys().read_file(path)
    assert "0123456789abcdef" not in str(refused.value)


def test_keys_come_from_the_environment_or_as_digests_too(tmp_path: Path) -> None:
    keys = Keys()
    keys.read_text(f"alice:{KEY}, bob:{BOB}")
    assert keys.find(BOB).name == "bob"
    digest = "53ae6da4d8d1f0f0fbfe5d7b6a60bc4b8a6ed8dd0e03c3fc8a8f7f4fe0d8ab01"
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.carol]\nsha256 = "{digest}"\n')
    keys.read_file(path)
    assert len(keys) == 3


def test_a_page_elsewhere_cannot_reach_a_local_server_by_a_name_of_its_own() -> None:
    config = ServerConfig(host_names={"127.0.0.1", "localhost"})
    with running_server(server_config=config) as server, server.http() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/health", headers={"host": "localhost:80"}).status_code == 200
        for path in ("/health", "/v1/models"):
            assert http.get(path, headers={"host": "evil.example:8000"}).status_code == 403


def serve(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from hotset.cli import main; main()", "serve", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


def test_a_public_address_is_refused_without_keys_and_so_are_bad_flags(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    for text, says in (
        ('host = "0.0.0.0"', "needs API keys"),
        ('host = "::"', "needs API keys"),
        ("prot = 1", "no option 'prot'"),
        ("port = [1]", "expected one value"),
        ('port = "x"', "not a valid integer"),
    ):
        config.write_text(text)
        done = serve("--config", str(config), HOTSET_API_KEYS="")
        assert done.returncode in (1, 2)
        assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    limits = Limits(max_tokens=8, max_n=2, request_timeout_s=20)
    config = ServerConfig(files_path=tmp_path_factory.mktemp("files"), limits=limits)
    with running_server(server_config=config) as running:
        yield running


def test_no_request_of_the_documents_kind_ends_in_a_5xx(small: RunningServer) -> None:
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
        tried.add(operation.label)
    assert len(tried) >= 15
    answered = [status for *_, status in small.api.gate.counts.requests.elements()]
    assert len(answered) > 15 * len(tried) / 2 and {200, 400, 404} <= set(answered)


VALID: dict[str, Any] = {
    **CHAT,
    "n": 1,
    "stop": ["a"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "chat_template_kwargs": {"a": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "seed": 1,
}
MESSAGE: dict[str, Any] = {
    "max_tokens": 4,
    "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "c"}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}, {"type": "bash_20250124"}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "disabled"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
    "stream": False,
}
RESPONSE: dict[str, Any] = {
    "max_output_tokens": 4,
    "instructions": "a",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "t", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "t", "output": "c"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {}}, {"type": "web_search"}],
    "tool_choice": "auto",
    "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "integer"}}},
    "reasoning": {"effort": "low"},
    "store": True,
    "stream": False,
}
BODIES = {
    "/v1/chat/completions": VALID,
    "/tokenize": VALID,
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": MESSAGE,
    "/v1/responses": RESPONSE,
}
JUNK: list[Any] = [
    None, True, 0, -1, 2**63, 1e308, "", "\0", "\ud800", "\U0001d4b3" * 9, [], [[]], {}, {"a": {}},
    {"$ref": "#"}, {"type": "x"}, {"type": "object", "properties": 3}, {"pattern": "(a+)+$"},
    {"role": "user", "content": [{"type": "image_url"}]}, {"role": 5}, ["a", 1],
]  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """The value with something in it replaced by junk, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        return [*value[:i], mutate(value[i], rng), *value[i + rng.randrange(2) :]]
    return rng.choice(JUNK)


def test_no_mutated_body_ends_in_a_5xx(small: RunningServer) -> None:
    rng = random.Random(0)
    statuses = set()
    with small.http() as http:
        for path, body in BODIES.items():
            if path not in ("/tokenize", "/v1/messages/count_tokens"):  # which have less
                answer = http.post(path, json=body)
                assert answer.status_code == 200, (path, answer.text)
        for i in range(500):
            path = rng.choice(sorted(BODIES))
            body = mutate(BODIES[path], rng)
            content = json.dumps(body).encode()
            if i % 4 == 0:  # and break the JSON itself
                at = rng.randrange(len(content))
                content = content[:at] + rng.randbytes(2) + content[at + rng.randrange(3) :]
            response = http.post(path, content=content)
            assert response.status_code < 500, (content, response.text)
            statuses.add(response.status_code)
    assert {200, 400} <= statuses
    assert small.service.healthy
