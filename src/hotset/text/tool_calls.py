"""Tool calls: how they are read from a model's output while it grows.

Formats, told apart by what the output looks like:

- `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen;
- `<tool_call><function=name><parameter=a>1</parameter></function></tool_call>`: Qwen3-Coder and
  Qwen3.5; without `<tool_call>` only for models whose chat template writes `<function=`;
- `[TOOL_CALLS]` with a JSON list, or with `name[ARGS]{...}`: Mistral;
- JSON objects, after `<|python_tag|>` or at the start of the output: Llama 3.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from hotset.errors import HotsetError
from hotset.foreign_text import parse_json
from hotset.text.call_pieces import CallPiece, Pieces, call_of
from hotset.text.json_scan import JsonScan
from hotset.text.special_markers import MarkedText
from hotset.text.xml_values import to_json, types_of

Json = dict[str, Any]

HERMES_START, HERMES_END = "<tool_call>", "</tool_call>"
_MISTRAL_START, _MISTRAL_ARGS, _MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_LLAMA_START = "<|python_tag|>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
# Markers that may be special tokens, which the text of an output leaves out.
MARKERS = (HERMES_START, HERMES_END, _MISTRAL_START, _MISTRAL_ARGS, _MISTRAL_ID, _LLAMA_START)

_STRING = r'"(?:[^"\\]|\\.)*"'
_HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
    rf'"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)
_FIRST_KEY = re.compile(rf"\{{\s*({_STRING})")
_CALL_KEYS = {'"name"', '"type"', '"id"', '"function"', '"arguments"', '"parameters"'}
_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_MISTRAL_BEGUN = re.compile(r"\s*[\w.-]*\s*(?:\[[A-Z_]*(?:\]\s*[\w-]*\s*)?)*")
_FUNCTION_NAME = re.compile(r"<function=([^>\n]{1,256})>")
_FUNCTION_BEGUN = re.compile(r"<function=[^>\n]{0,256}")
_MOST_NAME = 256  # characters up to where a call's name has to be complete


class ToolCallParser:
    """Splits one output into text and tool calls while it streams.

    Text is given out as soon as it can be no part of a call. A call is given out once its name is
    known and its arguments begin; a start of a call that turns out to be none is text.
    Space right before a call, and after the last one, is left out. All pieces joined are the same
    however the output was cut.

    Args:
        tools: name -> JSON schema of the parameters. Without a marker, only JSON that names one of
            them is a call.
        markers: token id -> text, of the `MARKERS` that are special tokens.
        decode: the text of token ids, special ones too or not, by its second argument.
        has_functions: whether `<function=` begins a call without `<tool_call>` before it.
        forced_name: the output is the arguments of this tool.
        most_calls: calls beyond are left out; None is no bound.
    """

    def __init__(
        self,
        tools: Mapping[str, Json],
        markers: Mapping[int, str],
        decode: Callable[[Sequence[int], bool], str],
        *,
        has_functions: bool = False,
        forced_name: str | None = None,
        most_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._specials = frozenset(markers.values())
        self._marked = MarkedText(markers, decode)
        self._most_calls = most_calls
        self._starts: dict[str, Callable[[bool], bool]] = {
            HERMES_START: self._in_hermes,
            _MISTRAL_START: self._in_mistral,
            _LLAMA_START: self._in_llama,
        }
        if has_functions:
            self._starts[_FUNCTION] = self._in_function
        self._buffer = ""  # what is not yet understood
        self._aside = ""  # text within an XML call
        self._pieces = Pieces()  # what is new
        self._state: Callable[[bool], bool] = self._in_text
        self._space = ""  # held back: it goes where a call follows
        self._at_start = True  # nothing but space so far
        self._attempt = ""  # the text of a call that may turn out to be none
        self._marker = ""  # what the call began with; `{` and `[` for bare JSON
        self._num_calls = 0
        self._in_list = False
        self._scan: JsonScan | None = None
        self._num_scanned = 0
        self._types: frozenset[str] = frozenset()  # of the parameter, where calls are XML
        self._tool: Json = {}
        self._num_parameters = 0
        self._is_value_begun = False
        if forced_name is not None:
            self._begin_call(forced_name)
            self._begin_arguments(self._in_text)

    @property
    def num_calls(self) -> int:
        """How many calls there are so far."""
        most = self._most_calls
        return self._num_calls if most is None else min(self._num_calls, most)

    def feed(self, text: str, token_ids: Sequence[int]) -> Pieces:
        """Take in what is new of the output; returns what is new of its text and calls."""
        self._buffer += self._marked.feed(text, token_ids)
        return self._read(False)

    def end(self) -> Pieces:
        """The output is complete: returns the rest."""
        self._buffer += self._marked.end()
        pieces = self._read(True)
        self._emit_aside()
        pieces.text += self._pieces.text
        if not self._num_calls:
            pieces.text += self._space
        return pieces

    def _read(self, is_end: bool) -> Pieces:
        while self._state(is_end):
            pass
        pieces, self._pieces = self._pieces, Pieces()
        return pieces

    # Each state reads from the front of the buffer. It returns True where it read or decided
    # something, so that the next state has its turn, and False where it needs more of the output.

    def _in_text(self, is_end: bool) -> bool:
        if self._at_start and (stripped := self._buffer.lstrip()):
            if not is_end and _MISTRAL_START.startswith(stripped):
                return False
            self._at_start = False
            if stripped[0] in "[{" and not stripped.startswith(_MISTRAL_START):
                self._take(len(self._buffer) - len(stripped))
                self._marker, self._state = stripped[0], self._in_json
                return True
        found = [(at, one) for one in self._starts if (at := self._buffer.find(one)) >= 0]
        if not found:
            held = 0 if is_end else _begun(self._buffer, self._starts)
            self._emit_text(self._buffer[: len(self._buffer) - held])
            self._buffer = self._buffer[len(self._buffer) - held :]
            return False
        at, marker = min(found)
        self._emit_text(self._buffer[:at])
        self._buffer = self._buffer[at:]
        self._marker, self._state = marker, self._starts[marker]
        if marker != _FUNCTION:
            self._take(len(marker))
        return True

    def _in_hermes(self, is_end: bool) -> bool:
        self._take_space()
        if self._buffer.startswith(("{", _FUNCTION)):
            self._state = self._in_object if self._buffer[0] == "{" else self._in_function
            return True
        return self._wait(is_end, _FUNCTION)

    def _in_llama(self, is_end: bool) -> bool:
        self._take_space()
        if self._buffer.startswith(("[", "{")):
            self._state = self._in_json
            return True
        return self._wait(is_end)

    def _in_json(self, is_end: bool) -> bool:
        """At an object, or a list of them."""
        self._in_list = self._buffer[0] == "["
        if self._in_list:
            self._take(1)
        self._state = self._before_object
        return True

    def _before_object(self, is_end: bool) -> bool:
        self._take_space()
        if self._buffer.startswith("{"):
            self._state = self._in_object
            return True
        return self._wait(is_end)

    def _in_object(self, is_end: bool) -> bool:
        """`{"name": ..., "arguments": ...}`, whose arguments go through as they come."""
        if header := _HEADER.match(self._buffer):
            name = _parsed(header[1])
            if not self._may_call(name):
                return self._fail()
            self._buffer = self._buffer[header.end() :]
            self._begin_call(name)
            self._begin_arguments(self._after_arguments)
            return True
        first = _FIRST_KEY.match(self._buffer)
        if self._is_bare and first and first[1] not in _CALL_KEYS:
            return self._fail()
        if self._scan is None:
            self._scan, self._num_scanned = JsonScan(), 0
        end = self._scan.feed(self._buffer[self._num_scanned :])
        if end is None:
            self._num_scanned = len(self._buffer)
            return self._fail() if is_end else False
        end += self._num_scanned
        call = call_of(_parsed(self._buffer[:end]))
        if call is None or not self._may_call(call.name):
            return self._fail()
        self._buffer, self._scan = self._buffer[end:], None
        self._begin_call(call.name)
        self._emit_arguments(call.arguments)
        self._state = self._after_object
        return True

    def _begin_arguments(self, then: Callable[[bool], bool]) -> None:
        """At the `{` of arguments that are JSON; `then` follows them."""
        self._scan = JsonScan()
        self._state = lambda is_end: self._in_arguments(is_end, then)

    def _in_arguments(self, is_end: bool, then: Callable[[bool], bool]) -> bool:
        assert self._scan is not None
        end = self._scan.feed(self._buffer)
        self._emit_arguments(self._buffer[:end])
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._scan, self._state = None, then
        return True

    def _after_arguments(self, is_end: bool) -> bool:
        """Up to where the object around the arguments ends."""
        if self._scan is None:
            self._scan = JsonScan(depth=1)
        end = self._scan.feed(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._scan, self._state = None, self._after_object
        return True

    def _after_object(self, is_end: bool) -> bool:
        """What may be between two calls, or close them."""
        rest = self._buffer.lstrip()
        if self._in_list:
            if rest.startswith(","):
                self._take(len(self._buffer) - len(rest) + 1)
                self._state = self._before_object
            elif rest.startswith("]"):
                self._buffer, self._in_list = rest[1:], False
            elif rest or is_end:
                self._state, self._in_list = self._in_text, False
            else:
                return False
            return True
        if self._marker == HERMES_START:
            return self._after_hermes(is_end)
        rest = self._buffer.lstrip("; \n\t")
        if rest.startswith("{") and self._marker != _MISTRAL_START:
            self._take(len(self._buffer) - len(rest))
            self._state = self._in_object
        elif rest or is_end:
            self._buffer = self._buffer if rest else ""
            self._state = self._in_text
        else:
            return False
        return True

    def _after_hermes(self, is_end: bool) -> bool:
        rest = self._buffer.lstrip()
        if rest.startswith(HERMES_END):
            self._buffer, self._state = rest[len(HERMES_END) :], self._in_text
        elif rest.startswith(("{", _FUNCTION)):
            self._state = self._in_hermes
        elif is_end or not any(one.startswith(rest) for one in (HERMES_END, _FUNCTION)):
            self._state = self._in_text
        else:
            return False
        return True

    def _in_mistral(self, is_end: bool) -> bool:
        if self._buffer.lstrip()[:1] == "[":
            self._take_space()
            self._state = self._in_json
            return True
        if named := _MISTRAL_NAME.match(self._buffer):
            self._buffer = self._buffer[named.end() :]
            self._begin_call(named[1])
            self._begin_arguments(self._in_text)
            return True
        begun = len(self._buffer) <= _MOST_NAME and _MISTRAL_BEGUN.fullmatch(self._buffer)
        return False if begun and not is_end else self._fail()

    def _in_function(self, is_end: bool) -> bool:
        """At `<function=`."""
        if (named := _FUNCTION_NAME.match(self._buffer)) and self._may_call(named[1].strip()):
            self._buffer = self._buffer[named.end() :]
            self._begin_call(named[1].strip())
            self._state, self._num_parameters = self._in_xml, 0
            return True
        begun = not named and _FUNCTION_BEGUN.fullmatch(self._buffer)
        return False if begun and not is_end else self._fail()

    def _in_xml(self, is_end: bool) -> bool:
        """Between parameters."""
        rest = self._buffer.lstrip()
        if self._aside:
            self._aside += self._buffer[: len(self._buffer) - len(rest)]
            self._buffer = rest
        name, closed, after = rest.removeprefix(_PARAMETER).partition(">")
        is_first = not (self._num_parameters or self._aside)
        if rest.startswith("{") and is_first:  # Llama's way with this tag
            self._buffer = rest
            self._begin_arguments(self._after_function)
        elif rest.startswith(_PARAMETER) and closed:
            self._types = types_of(self._tool, name.strip())
            before = ", " if self._num_parameters else "{"
            self._num_parameters += 1
            self._emit_arguments(f"{before}{json.dumps(name.strip(), ensure_ascii=False)}: ")
            self._buffer, self._is_value_begun = after, False
            self._state = self._in_value
        elif rest.startswith((_FUNCTION_END, HERMES_END)):
            self._emit_arguments("}" if self._num_parameters else "{}")
            self._buffer, self._state = rest, self._after_function
        elif rest.startswith(_PARAMETER) or _begun(rest, _XML_TAGS) == len(rest):
            return False
        else:  # no part of a call
            other = self._buffer.find("<", len(self._buffer) - len(rest) + 1)
            self._aside += self._buffer if other < 0 else self._buffer[:other]
            self._buffer = "" if other < 0 else self._buffer[other:]
        return True

    def _in_value(self, is_end: bool) -> bool:
        """A parameter's value; a string goes through as it comes."""
        value, closed, rest = self._buffer.partition(_PARAMETER_END)
        is_text = self._types == {"string"}
        if not closed and not is_text:
            return False
        if not self._is_value_begun and not value and not closed:
            return False
        if closed:
            self._buffer, self._state = rest, self._in_xml
            value = value.removesuffix("\n")
        else:
            held = _begun(value, ("\n" + _PARAMETER_END, _PARAMETER_END))
            if held == len(value):
                return False
            self._buffer = value[len(value) - held :]
            value = value[: len(value) - held]
        if not self._is_value_begun:
            value = value.removeprefix("\n")
        if not is_text:
            self._emit_arguments(to_json(value, self._types))
            return True
        opening = "" if self._is_value_begun else '"'
        self._is_value_begun = True
        inside = json.dumps(value, ensure_ascii=False)[1:-1]
        self._emit_arguments(opening + inside + ('"' if closed else ""))
        return bool(closed)

    def _after_function(self, is_end: bool) -> bool:
        rest = self._buffer.lstrip()
        if rest.startswith(_FUNCTION_END):
            self._buffer = rest = rest[len(_FUNCTION_END) :]
        elif not is_end and _FUNCTION_END.startswith(rest):
            return False
        self._emit_aside()
        self._state = self._after_hermes  # the model may have left out the tag before it only
        return True

    @property
    def _is_bare(self) -> bool:
        return self._marker in ("{", "[", _FUNCTION)

    def _may_call(self, name: object) -> TypeGuard[str]:
        return isinstance(name, str) and bool(name) and (not self._is_bare or name in self._tools)

    def _wait(self, is_end: bool, *awaited: str) -> bool:
        """Wait while the buffer is a beginning of one of `awaited`; else it is no call."""
        may_come = not self._buffer or any(one.startswith(self._buffer) for one in awaited)
        return False if may_come and not is_end else self._fail()

    def _fail(self) -> bool:
        """A start of a call turned out to be none: it is text."""
        text = self._attempt
        if self._marker in self._specials:  # a special token is no text
            text = text.removeprefix(self._marker)
        if self._is_bare and self._buffer.startswith(self._marker):
            text += self._buffer[:1]  # not to be found again as the start of a call
            self._buffer = self._buffer[1:]
        self._attempt, self._scan, self._in_list = "", None, False
        self._emit_text(text)
        self._state = self._in_text
        return True

    def _take(self, length: int) -> None:
        self._attempt += self._buffer[:length]
        self._buffer = self._buffer[length:]

    def _take_space(self) -> None:
        self._take(len(self._buffer) - len(self._buffer.lstrip()))

    def _begin_call(self, name: str) -> None:
        self._attempt = self._space = ""
        self._at_start = False
        self._tool = self._tools.get(name, {})
        self._num_calls += 1
        if self._num_calls == self.num_calls:
            self._pieces.calls.append(CallPiece(self._num_calls - 1, name, ""))

    def _emit_arguments(self, arguments: str) -> None:
        if arguments and self._num_calls == self.num_calls:
            self._pieces.calls.append(CallPiece(self._num_calls - 1, None, arguments))

    def _emit_aside(self) -> None:
        """Text within an XML call comes behind it: readers of a call expect it in one."""
        aside, self._aside = self._aside.strip(), ""
        self._emit_text(aside)

    def _emit_text(self, text: str) -> None:
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        self._pieces.text += body


_XML_TAGS = (_PARAMETER, _FUNCTION_END, HERMES_END)


def _begun(text: str, markers: Sequence[str] | Mapping[str, Any]) -> int:
    """Length of the longest end of `text` that one of `markers` could go on from."""
    longest = max(map(len, markers)) - 1
    for length in range(min(len(text), longest), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


def _parsed(text: str) -> object:
    try:
        return parse_json(text, check_unicode=True)
    except HotsetError:
        return None
