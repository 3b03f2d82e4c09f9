import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.errors import RequestError
from hotset.model.tool_calls import (
    ToolCall,
    ToolCallParser,
    forced_schema,
    parse_tool_calls,
    read_forced,
)

NAMES = frozenset({"weather", "time"})
WEATHER = ToolCall("weather", '{"place": "Rome"}')
CLOCK = ToolCall("time", "{}")


@pytest.mark.parametrize(
    ("text", "before", "calls"),
    [
        (
            'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n'
            '</tool_call>\n<tool_call>{"name": "time", "arguments": {}}</tool_call>',
            "Let me look.",
            [WEATHER, CLOCK],
        ),
        ('<tool_call>{"name": "time", "arguments": {}}', "", [CLOCK]),  # no room for the end
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "Rome"}}]', "", [WEATHER]),
        (
            '[TOOL_CALLS]weather[ARGS]{"place": "Rome"}[TOOL_CALLS]time[ARGS]{}',
            "",
            [WEATHER, CLOCK],
        ),
        ("[TOOL_CALLS]time[CALL_ID]a1[ARGS]{}", "", [CLOCK]),
        ('{"name": "weather", "parameters": {"place": "Rome"}}', "", [WEATHER]),
        (
            '<|python_tag|>{"name": "weather", "parameters": {"place": "Rome"}}; '
            '{"name": "time", "parameters": {}}',
            "",
            [WEATHER, CLOCK],
        ),
        ('{"name": "other", "parameters": {}}', None, []),  # JSON, but no tool of ours
        ('{"answer": 42}', None, []),
        ("<tool_call>{broken</tool_call>", None, []),
        ("[TOOL_CALLS]weather[ARGS]{", None, []),
        ("[1, 2, 3]", None, []),
        ("Just text.", None, []),
        ("", None, []),
    ],
)
def test_calls_of_each_format_are_read_and_the_rest_is_text(
    text: str, before: str | None, calls: list[ToolCall]
) -> None:
    assert parse_tool_calls(text, NAMES) == (text if before is None else before, calls)


def stream(text: str, cuts: list[int]) -> tuple[str, list[str], list[ToolCall]]:
    """Feed the text in pieces; all text that came out, its pieces, and the calls."""
    parser = ToolCallParser(NAMES, {}, lambda ids, special: "")
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [parser.feed(text[a:b], ()) for a, b in itertools.pairwise(places)]
    rest, calls = parser.end()
    return "".join(pieces) + rest, pieces, calls


@given(
    st.sampled_from(
        [
            "no call at all, a < b and [TOOL but not quite",
            'Sure: <tool_call>{"name": "time", "arguments": {}}</tool_call>',
            '[TOOL_CALLS] [{"name": "time", "arguments": {}}]',
            '{"name": "time", "parameters": {}}',
            '{"nothing": 1} and more',
            "<tool_call>broken",
        ]
    ),
    st.lists(st.integers(0, 70), max_size=8),
)
def test_a_stream_gives_what_the_whole_text_gives(text: str, cuts: list[int]) -> None:
    sent, _, calls = stream(text, cuts)
    before, whole = parse_tool_calls(text, NAMES)
    assert calls == whole
    assert sent.rstrip() == before.rstrip()


def test_text_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    _, pieces, _ = stream("abc <tool and more", [3, 9])
    assert pieces == ["abc", " ", "<tool and more"]


def test_a_marker_that_is_a_special_token_is_found_by_its_id() -> None:
    words = {1: "Hm. ", 7: "[TOOL_CALLS]", 8: '[{"name": "time", "arguments": {}}]'}

    def decode(ids: Any, special: bool) -> str:
        return "".join(words[i] for i in ids if special or i != 7)

    parser = ToolCallParser(NAMES, {7: "[TOOL_CALLS]"}, decode)
    assert parser.feed(words[1] + words[8], [1, 7, 8]) == "Hm. "  # all in one output
    assert parser.end() == ("", [CLOCK])


def test_forced_schemas_allow_nothing_but_calls() -> None:
    tools = [
        {"name": "weather", "parameters": {"type": "object", "$defs": {"a": {"type": "string"}}}},
        {"name": "time"},
    ]
    assert forced_schema(tools, name="time", parallel=True) == {"type": "object"}
    schema = forced_schema(tools, name=None, parallel=False)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert schema["$defs"] == {"a": {"type": "string"}}  # where their references look
    names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
    assert names == ["weather", "time"]
    with pytest.raises(RequestError, match="not among"):
        forced_schema(tools, name="other", parallel=True)
    clash = [*tools, {"name": "b", "parameters": {"$defs": {"a": {"type": "integer"}}}}]
    with pytest.raises(RequestError, match="another way"):
        forced_schema(clash, name=None, parallel=True)


def test_a_forced_output_is_its_calls() -> None:
    text = json.dumps([{"name": "time", "arguments": {}}])
    assert read_forced(text, None) == [CLOCK]
    assert read_forced('{"place": "Rome"}', "weather") == [WEATHER]
    assert read_forced(text[:-4], None) == []
