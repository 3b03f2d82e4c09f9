"""Tools: how calls are read from a model's output, and how they are asked for by force.

Formats, told apart by what the output looks like: `<tool_call>{...}</tool_call>` (Hermes, Qwen),
`[TOOL_CALLS]` with a JSON list or with `name[ARGS]{...}` (Mistral), and bare JSON objects, after
`<|python_tag|>` or not (Llama 3).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hotset.errors import RequestError
from hotset.foreign_text import ForeignTextError, parse_json

Json = dict[str, Any]

HERMES_START, HERMES_END = "<tool_call>", "</tool_call>"
_MISTRAL_START, _MISTRAL_ARGS, _LLAMA_START = "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"
MARKERS = (HERMES_START, _MISTRAL_START, _LLAMA_START)

_HERMES_CALL = re.compile(rf"{HERMES_START}\s*(.*?)\s*(?:{HERMES_END}|\Z)", re.DOTALL)
_MISTRAL_NAME = re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?")
_JSON = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call a model asks for; `arguments` is JSON text, as the OpenAI API has it."""

    name: str
    arguments: str


class ToolCallParser:
    """Splits one output into text and tool calls while it streams.

    Text goes through until it may be a call; from there on it is held back to the end.

    Args:
        names: of the tools there are; bare JSON is a call only if it names one of them.
        markers: token id -> text, of the `MARKERS` that are special tokens, which the text of an
            output does not show.
        decode: the text of token ids, special ones too or not, by its second argument.
    """

    def __init__(
        self,
        names: frozenset[str],
        markers: Mapping[int, str],
        decode: Callable[[Sequence[int], bool], str],
    ) -> None:
        self._names = names
        self._markers = markers
        self._decode = decode
        self._text = ""  # all of it
        self._num_sent = 0
        self._token_ids: list[int] = []
        self._marker_at: int | None = None  # index into `_token_ids`

    def feed(self, text: str, token_ids: Sequence[int]) -> str:
        """Take in what is new; returns the text that is certainly no part of a call."""
        if self._marker_at is None:
            for i, token_id in enumerate(token_ids):
                if token_id in self._markers:
                    self._marker_at = len(self._token_ids) + i
                    break
        self._token_ids += token_ids
        self._text += text
        if self._marker_at is not None:
            before = self._decode(self._token_ids[: self._marker_at], False)
            return self._send(min(len(before), len(self._text)))
        if self._text.lstrip()[:1] in ("{", "["):
            return ""
        found = [at for marker in MARKERS if (at := self._text.find(marker)) >= 0]
        return self._send(min(found) if found else len(self._text) - self._marker_start())

    def end(self) -> tuple[str, list[ToolCall]]:
        """The text that was held back and is none, and the calls."""
        rest = self._text[self._num_sent :]
        if self._marker_at is not None:
            source = self._decode(self._token_ids[self._marker_at :], True)
        else:
            source = rest
        text, calls = parse_tool_calls(source, self._names)
        self._num_sent = len(self._text)
        return (text, calls) if calls else (rest, [])

    def _send(self, end: int) -> str:
        new = self._text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return new

    def _marker_start(self) -> int:
        """Length of the longest end of the text that a marker could go on from."""
        for length in range(min(len(self._text), max(map(len, MARKERS)) - 1), 0, -1):
            if any(marker.startswith(self._text[-length:]) for marker in MARKERS):
                return length
        return 0


def parse_tool_calls(text: str, names: frozenset[str]) -> tuple[str, list[ToolCall]]:
    """Read the calls of a whole text; returns the text before them, and them.

    What is no call in any format is all text.
    """
    for marker, read in (
        (HERMES_START, _read_hermes),
        (_MISTRAL_START, _read_mistral),
        (_LLAMA_START, _read_objects),
    ):
        before, found, after = text.partition(marker)
        if found:
            calls = read(marker + after)
            return (before.rstrip(), calls) if calls else (text, [])
    calls = _read_objects(text) if text.lstrip()[:1] in ("{", "[") else []
    if calls and all(call.name in names for call in calls):
        return "", calls
    return text, []


def _read_hermes(text: str) -> list[ToolCall]:
    calls = []
    for match in _HERMES_CALL.finditer(text):
        try:
            call = _call(parse_json(match[1]))
        except ForeignTextError:
            return []
        if call is None:
            return []
        calls.append(call)
    return calls


def _read_mistral(text: str) -> list[ToolCall]:
    rest = text.removeprefix(_MISTRAL_START)
    if rest.lstrip().startswith("["):
        return _read_objects(rest)
    calls = []
    while match := _MISTRAL_NAME.match(rest):
        try:
            arguments, end = _JSON.raw_decode(rest, match.end())
        except (ValueError, RecursionError):
            return []
        calls.append(ToolCall(match[1], json.dumps(arguments, ensure_ascii=False)))
        rest = rest[end:]
    return calls


def _read_objects(text: str) -> list[ToolCall]:
    """JSON objects, one after the other with `;` or space between them, or a list of them."""
    rest = text.removeprefix(_LLAMA_START).strip()
    calls: list[ToolCall] = []
    while rest:
        try:
            value, end = _JSON.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            call = _call(item)
            if call is None:
                return []
            calls.append(call)
        rest = rest[end:].lstrip("; \n\t")
    return calls


def _call(value: object) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def forced_schema(tools: Sequence[Json], *, name: str | None, parallel: bool) -> Json:
    """The JSON schema of an output that can only be calls; `read_forced` reads it.

    Args:
        tools: the `function` objects of the request.
        name: of the one to call; None leaves the choice.
        parallel: whether there may be several calls.

    Raises:
        RequestError: there is no tool of that name, or two have `$defs` of one name.
    """
    if name is not None:
        for tool in tools:
            if tool["name"] == name:
                return tool.get("parameters") or {"type": "object"}
        raise RequestError(
            f"tool_choice names {name!r}, which is not among the tools", param="tool_choice"
        )
    definitions: Json = {}
    calls = []
    for tool in tools:
        parameters = dict(tool.get("parameters") or {"type": "object"})
        for key, value in (parameters.pop("$defs", None) or {}).items():
            if definitions.setdefault(key, value) != value:
                raise RequestError(
                    f"two tools define {key!r} in $defs, each another way", param="tools"
                )
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: Json = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def read_forced(text: str, name: str | None) -> list[ToolCall]:
    """The calls of an output made under `forced_schema`; one that was cut off is as far as it got.

    A cut list of calls has no whole JSON: its text is then the arguments of no call, so none.
    """
    if name is not None:
        return [ToolCall(name, text)]
    try:
        values = parse_json(text)
    except ForeignTextError:
        return []
    return [call for value in values if (call := _call(value)) is not None]
