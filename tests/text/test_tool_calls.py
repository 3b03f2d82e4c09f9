import itertools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hotset.errors import RequestError
from hotset.grammar.json_schema import prepare
from hotset.text.call_pieces import Pieces, ToolCall, join
from hotset.text.forced_calls import forced_schema
from hotset.text.tool_calls import ToolCallParser
from hotset.text.xml_values import to_json, types_of

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {},
    "time": {},
    "edit": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "line": {"type": "integer"},
            "ratio": {"type": "number"},
            "all": {"type": "boolean"},
            "tags": {"type": "array"},
            "mode": {"enum": ["a", "b", 3]},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "size": {"$ref": "#/$defs/size"},
        },
        "$defs": {"size": {"type": ["integer", "null"]}},
    },
}
WEATHER = ToolCall("weather", '{"place": "Rome"}')
CLOCK = ToolCall("time", "{}")
TAGGED = ToolCall("time", '{"zone": "</tool_call> } [TOOL_CALLS] \\" <function=a>"}')
XML = (
    "<tool_call>\n<function=edit>\n<parameter=path>\na </function> b\n\n</parameter>\n"
    "<parameter=line>\n12\n</parameter>\n<parameter=all>True</parameter></function>\n</tool_call>"
)
EDIT = ToolCall("edit", '{"path": "a </function> b\\n", "line": 12, "all": true}')

CASES: list[tuple[str, str, list[ToolCall]]] = [
    (
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n'
        '</tool_call>\n<tool_call>{"name": "time", "arguments": {}}</tool_call>',
        "Let me look.",
        [WEATHER, CLOCK],
    ),
    ('<tool_call>{"name": "time", "arguments": {}}', "", [CLOCK]),  # no room for the end
    ('[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "Rome"}}]', "", [WEATHER]),
    ('[TOOL_CALLS]weather[ARGS]{"place": "Rome"}[TOOL_CALLS]time[ARGS]{}', "", [WEATHER, CLOCK]),
    ("[TOOL_CALLS]time[CALL_ID]a1[ARGS]{}", "", [CLOCK]),
    ('{"name": "weather", "parameters": {"place": "Rome"}}', "", [WEATHER]),
    (
        '<|python_tag|>{"name": "weather", "parameters": {"place": "Rome"}}; '
        '{"name": "time", "parameters": {}}',
        "",
        [WEATHER, CLOCK],
    ),
    ('{"type": "function", "name": "time", "parameters": {}}', "", [CLOCK]),
    ('[{"name": "time", "arguments": {}}, {"arguments": {}, "name": "time"}]', "", [CLOCK] * 2),
    ('<tool_call>{"arguments": "{\\"place\\": \\"Rome\\"}", "name": "weather"}', "", [WEATHER]),
    # What looks like the end of a call within its arguments is none.
    (f'<tool_call>{{"name": "time", "arguments": {TAGGED.arguments}}}</tool_call>', "", [TAGGED]),
    (f"[TOOL_CALLS]time[ARGS]{TAGGED.arguments}", "", [TAGGED]),
    # Text goes on after a call.
    (
        'One. <tool_call>{"name": "time", "arguments": {}, "id": 1}</tool_call>\nTwo <b.\n'
        '<tool_call>{"name": "time", "arguments": {}}</tool_call> \n',
        "One.\nTwo <b.",
        [CLOCK, CLOCK],
    ),
    ('{"name": "time", "parameters": {}} That is all.\n', " That is all.", [CLOCK]),
    ("[TOOL_CALLS]time[ARGS]{} Done", " Done", [CLOCK]),
    # Calls as XML, whose values have the types of the schema.
    (f"Sure.\n\n{XML}", "Sure.", [EDIT]),
    (f"{XML}\n{XML}\nDone.", "\nDone.", [EDIT, EDIT]),
    (XML.removeprefix("<tool_call>\n"), "", [EDIT]),  # as Qwen3-Coder often has it
    ("<tool_call><function=time></function></tool_call>", "", [CLOCK]),
    ('<function=weather>{"place": "Rome"}</function>', "", [WEATHER]),  # Llama 3.1
    ("<tool_call>\n<function=time>\n</tool_call>", "", [CLOCK]),
    (
        "<tool_call><function=edit>hm <parameter=x>1</parameter></function></tool_call>",
        "hm",
        [ToolCall("edit", '{"x": "1"}')],
    ),
    # Cut by the budget: as far as it got.
    (
        '<tool_call>{"name": "weather", "arguments": {"place": "Ro',
        "",
        [ToolCall("weather", '{"place": "Ro')],
    ),
    (
        "<tool_call><function=edit><parameter=path>\nab",
        "",
        [ToolCall("edit", '{"path": "ab')],
    ),
]
NO_CALLS = [
    '{"name": "other", "parameters": {}}',  # JSON, but no tool of ours
    '{"answer": 42}',
    '{"name": "time"}',
    "<tool_call>{broken</tool_call>",
    "[TOOL_CALLS]weather[ARGS]{"[:-1],
    "[TOOL_CALLS] and more",
    "[1, 2, 3]",
    "Just text.",
    " \n",
    "",
    "no call at all, a < b and [TOOL but not quite",
    "<tool_call> is how a call begins, <function=time x> too",
    "<function=other></function>",
    '{"nothing": 1} and more <tool_cal',
    "<|python_tag|>print(1)",
    # No UTF-8, or no JSON, can say these again.
    r'<tool_call>{"arguments": {"a": "\ud800"}, "name": "time"}</tool_call>',
    r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {"a": 1e999}, "name": "time"}</tool_call>',
    '{"parameters": {"a": NaN}, "name": "time"}',
    "Text with a tail  \n",
]


def parser(**options: Any) -> ToolCallParser:
    return ToolCallParser(TOOLS, {}, lambda ids, special: "", has_functions=True, **options)


def stream(text: str, cuts: list[int], **options: Any) -> tuple[list[Pieces], list[ToolCall], str]:
    """Feed the text in pieces; what came out piece by piece, the calls, and all text."""
    one = parser(**options)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [one.feed(text[a:b], ()) for a, b in itertools.pairwise(places)]
    pieces.append(one.end())
    joined, calls = join(pieces)
    assert len(calls) == one.num_calls
    return pieces, calls, joined


@pytest.mark.parametrize(("text", "outside", "calls"), CASES)
def test_calls_of_each_format_are_read_and_the_rest_is_text(
    text: str, outside: str, calls: list[ToolCall]
) -> None:
    assert stream(text, [])[1:] == (calls, outside)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_text_as_it_was(text: str) -> None:
    assert stream(text, [])[1:] == ([], text)
    assert stream(text, list(range(len(text))))[1:] == ([], text)


@given(
    st.lists(
        st.sampled_from([*(text for text, _, _ in CASES), *NO_CALLS]), min_size=1, max_size=2
    ).map("\n".join),
    st.lists(st.integers(0, 200), max_size=10),
)
def test_a_stream_gives_what_the_whole_text_gives(text: str, cuts: list[int]) -> None:
    _, calls, sent = stream(text, cuts)
    assert stream(text, [])[1:] == (calls, sent)
    assert stream(text, list(range(len(text))))[1:] == (calls, sent)


PIECES = [
    *("<tool_call>", "</tool_call>", "<function=time>", "<function=edit>", "</function>"),
    *("<parameter=line>", "<parameter=note>", "</parameter>", '{"name": "time", "arguments": {}}'),
    *('{"arguments": {"a": 1}, "name": "time"}', "[TOOL_CALLS]", 'time[ARGS]{"a": 1}', "{}"),
    *("<|python_tag|>", "[", "]", "{", "}", ",", ";", "<", "\n", " ", "1", "text"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.booleans())
@example("<function=time>text{}</function>", True)
@example("<function=time>text\n<parameter=line>1</parameter>text", True)
def test_pieces_of_calls_come_out_the_same_however_they_are_cut(text: str, is_first: bool) -> None:
    options: dict[str, Any] = {"most_calls": 1} if is_first else {}
    every = list(range(len(text)))
    assert stream(text, every, **options)[1:] == stream(text, [], **options)[1:]


@given(st.text(alphabet='<>{}[]"\\:,/= \nabtol_cfunip', max_size=60), st.integers(0, 60))
def test_any_text_comes_out_the_same_however_it_is_cut(noise: str, cut: int) -> None:
    for text in (noise, "<tool_call>" + noise, '{"name": "time", "arguments": {"a":' + noise):
        assert stream(text, [cut])[1:] == stream(text, [])[1:]


@given(st.text('ab<>/ \n\t"\\é😀{}parmet=', max_size=40), st.lists(st.integers(0, 200), max_size=6))
def test_xml_strings_come_back_as_they_were(value: str, cuts: list[int]) -> None:
    value = value.replace("</parameter>", "")
    text = f"<tool_call><function=edit><parameter=path>\n{value}\n</parameter></function>"
    _, [call], rest = stream(text, cuts)
    assert json.loads(call.arguments) == {"path": value}
    assert rest == ""


def test_arguments_stream_as_they_grow() -> None:
    text = 'Hm. <tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
    pieces, _, _ = stream(text, list(range(0, len(text), 8)))
    calls = [call for piece in pieces for call in piece.calls]
    assert [call.name for call in calls] == ["weather"] + [None] * (len(calls) - 1)
    assert [len(call.arguments) for call in calls] > [0, 1, 1]
    assert len(calls) > 3
    assert "".join(call.arguments for call in calls) == '{"place": "Rome"}'
    xml = "<tool_call><function=edit><parameter=path>\none two three\nfour"
    pieces, _, _ = stream(xml, list(range(40, len(xml), 4)))
    grown = [call.arguments for piece in pieces for call in piece.calls]
    assert len(grown) > 5


def test_text_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    pieces, _, _ = stream("abc <tool and more", [3, 9])
    assert [piece.text for piece in pieces] == ["abc", "", " <tool and more", ""]
    pieces, _, _ = stream('{"answer": 42, "more": [1, 2]}', [10])
    assert pieces[0].text == '{"answer":'


@given(st.sampled_from([text for text, _, _ in CASES]), st.lists(st.integers(0, 200), max_size=30))
def test_no_text_comes_within_a_call(text: str, cuts: list[int]) -> None:
    pieces, _, _ = stream(text, cuts)
    num_begun = num_closed = 0
    for piece in pieces:
        assert all(call.index >= num_closed for call in piece.calls)
        if piece.text:
            num_closed = num_begun
        num_begun += sum(call.name is not None for call in piece.calls)


def test_calls_beyond_the_first_are_left_out_where_one_is_asked_for() -> None:
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    assert stream(f"{call}{call} x", [], most_calls=1)[1:] == ([CLOCK], " x")


def test_a_marker_that_is_a_special_token_is_found_by_its_id() -> None:
    words = {
        1: "Hm. ",
        7: "[TOOL_CALLS]",
        8: '[{"name": "time", "arguments": {}}]',
        9: "weather",
        10: "[ARGS]",
        11: '{"place": "Rome"}',
        12: " no call",
    }
    markers = {7: "[TOOL_CALLS]", 10: "[ARGS]"}

    def decode(ids: Any, special: bool) -> str:
        return "".join(words[i] for i in ids if special or i not in markers)

    def read(outputs: list[list[int]]) -> tuple[str, list[ToolCall]]:
        one = ToolCallParser(TOOLS, markers, decode)
        return join([*(one.feed(decode(ids, False), ids) for ids in outputs), one.end()])

    assert read([[1, 7, 8]]) == read([[1], [7], [8]]) == ("Hm.", [CLOCK])  # all in one output
    both = [1, 7, 9, 10, 11, 7, 9, 10, 11]
    assert read([both]) == read([[i] for i in both]) == ("Hm.", [WEATHER, WEATHER])
    assert read([[1, 7, 12]]) == read([[1], [7], [12]]) == ("Hm.  no call", [])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("path", "12", "12"),
        ("line", "12", 12),
        ("line", "12.0", 12),
        ("line", "twelve", "twelve"),
        ("ratio", "1e-3", 0.001),
        ("ratio", "2", 2),
        ("all", "True", True),
        ("all", "false", False),
        ("all", "yes", "yes"),
        ("tags", '["a", 1]', ["a", 1]),
        ("tags", "['a', None, True]", ["a", None, True]),
        ("mode", "3", 3),
        ("mode", "b", "b"),
        ("note", "None", None),
        ("note", "null", None),
        ("note", '"quoted"', '"quoted"'),
        ("note", "7", "7"),
        ("size", "7", 7),
        ("size", "none", None),
        ("unknown", "7", "7"),
        # Exact where a float is not, and always JSON that UTF-8 can hold.
        ("line", "9007199254740993.0", 9007199254740993),
        ("line", "1e22", 10**22),
        ("line", "1e23", 10**23),
        ("line", "1e999", "1e999"),
        ("ratio", "1e999", "1e999"),
        ("ratio", "NaN", "NaN"),
        ("ratio", "9007199254740993", 9007199254740993),
        ("tags", "[1e999]", "[1e999]"),
        ("tags", '["\\ud800"]', '["\\ud800"]'),
        ("tags", "['\\ud800']", "['\\ud800']"),
    ],
)
def test_xml_values_have_the_types_of_the_schema(name: str, text: str, value: Any) -> None:
    found = json.loads(to_json(text, types_of(TOOLS["edit"], name)))
    assert (found, type(found)) == (value, type(value))


def test_forced_schemas_allow_nothing_but_calls() -> None:
    tools = [
        {"name": "weather", "parameters": {"type": "object", "$defs": {"a": {"type": "string"}}}},
        {"name": "time"},
    ]
    assert forced_schema(tools, name="time", parallel=True) == {"type": "object"}
    schema = forced_schema(tools, name=None, parallel=False)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
    assert names == ["weather", "time"]
    with pytest.raises(RequestError, match="not among"):
        forced_schema(tools, name="other", parallel=True)
    for name in (None, "bad"):
        with pytest.raises(RequestError, match="'bad' has parameters of type 'string'; expected"):
            bad = {"name": "bad", "parameters": {"type": "string"}}
            forced_schema([bad], name=name, parallel=True)
    for no_type in (5, None, True, {}, [[]], {"object": 1}):
        with pytest.raises(RequestError, match=r"'bad' has parameters of type .*; expected object"):
            bad = {"name": "bad", "parameters": {"type": no_type}}
            forced_schema([bad], name=None, parallel=True)


def test_references_of_each_tool_find_what_is_in_it() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        properties = {"a": {"$ref": "#/$defs/a"}, "again": {"$ref": "#"}}
        parameters = {"properties": properties, "$defs": {"a": {"type": kind}}, "$id": "http://x/"}
        return {"name": name, "parameters": parameters}

    tools = [tool("f", "string"), tool("g", "integer")]
    schema = forced_schema(tools, name=None, parallel=True)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = [
        {"name": "f", "arguments": {"a": "x", "again": {"a": "y", "again": {}}}},
        {"name": "g", "arguments": {"a": 1}},
    ]
    validator.validate(good)
    prepare(json.dumps(schema))
    for wrong in ({"a": 1}, {"again": {"a": 1}}, {"again": []}, "x"):
        assert not validator.is_valid([{"name": "f", "arguments": wrong}])
    assert tools[0]["parameters"]["properties"]["again"] == {"$ref": "#"}  # as it was


def test_a_forced_output_is_its_calls() -> None:
    text = json.dumps([{"name": "time", "arguments": {}}])
    assert stream(text, [])[1:] == ([CLOCK], "")
    assert stream(text, [3, 9, 30])[1:] == ([CLOCK], "")
    _, calls, rest = stream('{"place": "Rome"}', [4], forced_name="weather")
    assert (calls, rest) == ([WEATHER], "")
    _, calls, rest = stream('{"place": "Rome"}<|im_end|>', [4], forced_name="weather")
    assert (calls, rest) == ([WEATHER], "<|im_end|>")  # special tokens were asked for
    assert stream(text[:-3], [])[1] == [ToolCall("time", "{")]
    assert stream(text[:10], [])[1] == []
