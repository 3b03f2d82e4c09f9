"""Messages about bodies: the field, the value and what was expected, in no library's words."""

import json
import pickle
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hotset.errors import RequestError
from hotset.server.body import Part, parse_body
from hotset.server.messages_body import CountTokensRequest, MessagesRequest
from hotset.server.responses_body import ResponsesRequest
from hotset.server.schemas import (
    BatchRequest,
    ChatRequest,
    DetokenizeRequest,
    TextRequest,
    TokenizeRequest,
)

CHAT: dict[str, Any] = {"messages": []}
TEXT: dict[str, Any] = {"prompt": "a"}
MESSAGES: dict[str, Any] = {"messages": [], "max_tokens": 1}
KINDS: list[type[Part]] = [
    MessagesRequest,
    CountTokensRequest,
    ResponsesRequest,
    ChatRequest,
    TextRequest,
    TokenizeRequest,
    DetokenizeRequest,
    BatchRequest,
]


def refusal(kind: type[Part], body: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        parse_body(kind, body)
    return refused.value


@pytest.mark.parametrize(
    ("kind", "body", "message", "param", "code"),
    [
        (ChatRequest, [], "the body is []; expected an object", None, "invalid_type"),
        (ChatRequest, {}, "messages is missing", "messages", "missing_required_parameter"),
        (
            ChatRequest,
            {**CHAT, "best": 1},
            "best is not supported",
            "best",
            "unsupported_parameter",
        ),
        (
            ChatRequest,
            {**CHAT, "temperature": "hot"},
            'temperature is "hot"; expected a number',
            "temperature",
            "invalid_type",
        ),
        (ChatRequest, {**CHAT, "n": True}, "n is true; expected a whole number", "n", None),
        (
            ChatRequest,
            {**CHAT, "stop": 5},
            "stop is 5; expected a string or a list",
            "stop",
            "invalid_type",
        ),
        (
            ChatRequest,
            {**CHAT, "stop": {"str": 1}},
            'stop is {"str": 1}; expected a string or a list',
            "stop",
            "invalid_type",
        ),
        (
            ChatRequest,
            {**CHAT, "stop": ["a", None]},
            "stop.1 is null; expected a string",
            "stop.1",
            "invalid_type",
        ),
        (
            ChatRequest,
            {**CHAT, "tool_choice": "maybe"},
            "tool_choice is \"maybe\"; expected 'none', 'auto' or 'required' or an object",
            "tool_choice",
            "invalid_value",
        ),
        (
            ChatRequest,
            {**CHAT, "tool_choice": {"type": "function"}},
            "tool_choice.function is missing",
            "tool_choice.function",
            "missing_required_parameter",
        ),
        (
            ChatRequest,
            {**CHAT, "tools": [{"type": "function", "function": {"name": ""}}]},
            'tools.0.function.name is ""; expected at least 1 characters',
            "tools.0.function.name",
            "invalid_value",
        ),
        (
            ChatRequest,
            {**CHAT, "timeout_s": 0},
            "timeout_s is 0; expected more than 0",
            "timeout_s",
            "invalid_value",
        ),
        (
            TextRequest,
            {"prompt": {}},
            "prompt is {}; expected a string or a list",
            "prompt",
            "invalid_type",
        ),
        (
            TextRequest,
            {"prompt": ["a", "b", 5]},
            "prompt.2 is 5; expected a string",
            "prompt.2",
            "invalid_type",
        ),
        (
            TextRequest,
            {**TEXT, "best_of": 3},
            "best_of is 3 and n is 1; they must be the same",
            "best_of",
            "invalid_value",
        ),
        (
            DetokenizeRequest,
            {"tokens": ["x" * 100]},
            f'tokens.0 is "{"x" * 59}...; expected a whole number',
            "tokens.0",
            "invalid_type",
        ),
    ],
)
def test_a_message_names_the_field_its_value_and_what_was_expected(
    kind: type[Part], body: Any, message: str, param: str | None, code: str | None
) -> None:
    error = refusal(kind, body)
    assert (str(error), error.param, error.code) == (message, param, code or "invalid_type")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2**70)
    | st.floats(width=16)
    | st.sampled_from(["", "auto", "function", "json_schema", "text", "message", "user"])
    | st.sampled_from(["tool_use", "str", "\ud800", "a" * 70])
)
NAMES = st.sampled_from(
    [
        *sorted({name for kind in KINDS for name in kind.model_fields}),
        *("role", "content", "text", "arguments", "call_id", "input_schema", "tools"),
        *("type", "function", "name", "schema", "include_usage", "json_schema", "parameters"),
        "str",
    ]
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=600, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    base=st.sampled_from([CHAT, TEXT, MESSAGES, {"input": "a"}, {}]),
    body=st.dictionaries(NAMES, JUNK, max_size=4),
)
def test_no_message_holds_the_words_of_the_library(
    kind: type[Part], base: dict[str, Any], body: dict[str, Any]
) -> None:
    whole = {**base, **body}
    try:
        parse_body(kind, whole)
    except RequestError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 400
        assert error.code
        assert "openapi.json" not in message, f"no words for {error.__cause__!r}"
        for word in ("Input should", "Value error", "Field required", "Extra inputs", "pydantic"):
            assert word not in message
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            for one in cause.errors():
                assert one["msg"] not in message
                assert error.param is None or error.param.split(".")[0] in {
                    str(one["loc"][0]) for one in cause.errors() if one["loc"]
                }


def test_an_error_keeps_its_field_and_code_between_processes() -> None:
    error = RequestError("x is 1", param="x", code="invalid_type")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.param, copy.code) == ("x is 1", "x", "invalid_type")
    assert json.dumps(copy.args)
