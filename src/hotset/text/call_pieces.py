"""Tool calls, whole and in pieces: plain data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call a model asks for; `arguments` is JSON text, as the OpenAI API has it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """The new part of one call.

    Attributes:
        index: of the call in the output.
        name: where the call begins; None later on.
        arguments: the piece of JSON text that is new.
    """

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Pieces:
    """The new part of an output: text outside of calls, and pieces of calls.

    Once a call has begun, no text comes before its last piece: pieces that go on with a call stand
    before the text, and calls that begin behind it.
    """

    text: str = ""
    calls: list[CallPiece] = field(default_factory=list)


def join(pieces: Sequence[Pieces]) -> tuple[str, list[ToolCall]]:
    """The whole text and the whole calls."""
    names: list[str] = []
    arguments: list[str] = []
    for piece in pieces:
        for call in piece.calls:
            if call.name is not None:
                names.append(call.name)
                arguments.append("")
            arguments[call.index] += call.arguments
    calls = [ToolCall(*both) for both in zip(names, arguments, strict=True)]
    return "".join(piece.text for piece in pieces), calls


def call_of(value: object) -> ToolCall | None:
    """A call from an object whose keys are in another order, or whose arguments are text."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    try:
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:  # 1e999 was read as a number that JSON cannot say
        return None
