"""The opposite of a JSON schema, as a schema: for `not` and `if`."""

import itertools
import re
from typing import Any

from hotset.grammar.nodes import CONSTRAINTS, Schema, resolve
from hotset.grammar.values import type_of

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_OPPOSITE_BOUNDS = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}


class CannotNegateError(Exception):
    """No schema says the opposite; the message is the keyword."""


def negate(schema: Schema, root: dict[str, Any], depth: int = 8) -> Schema:
    """A schema of all values that do not fit `schema`.

    Raises:
        CannotNegateError: `schema` has a keyword that has no opposite here.
    """
    if isinstance(schema, bool):
        return not schema
    if not depth:
        raise CannotNegateError("$ref")
    options: list[Schema] = []
    for key, value in schema.items():
        if key in CONSTRAINTS:
            options += _opposites(key, value, root, depth)
    options = [one for one in options if one is not False]
    return {"anyOf": options} if options else False


def _opposites(key: str, value: Any, root: dict[str, Any], depth: int) -> list[Schema]:
    """A value does not fit if at least one keyword rules it out."""
    match key:
        case "type":
            return [_other_types([value] if isinstance(value, str) else list(value))]
        case "const":
            return _other_values([value])
        case "enum":
            return _other_values(value)
        case "$ref" if isinstance(target := resolve(root, value), dict):
            return [negate(target, root, depth - 1)]
        case "anyOf":
            return [{"allOf": [negate(one, root, depth - 1) for one in value]}]
        case "allOf":
            return [negate(one, root, depth - 1) for one in value]
        case "not":
            return [value]
        case "required":
            return [{"type": "object", "properties": {name: False}} for name in value]
        case "properties":
            return [
                {"type": "object", "required": [name], "properties": {name: opposite}}
                for name, one in value.items()
                if (opposite := negate(one, root, depth - 1)) is not False
            ]
        case _ if key in _OPPOSITE_BOUNDS and isinstance(value, (int, float)):
            kind, opposite_key, by = _OPPOSITE_BOUNDS[key]
            bound = value + by
            return [{"type": kind, opposite_key: bound}] if by != -1 or bound >= 0 else []
    raise CannotNegateError(key)


def _other_types(types: list[str]) -> Schema:
    if "integer" in types and "number" not in types:
        raise CannotNegateError("integer")  # numbers with a fraction have no schema
    return _of_types([name for name in _TYPES if name not in types])


def _of_types(types: list[str]) -> Schema:
    return {"type": types} if types else False


def _other_values(values: list[Any]) -> list[Schema]:
    texts = [one for one in values if isinstance(one, str)]
    numbers = sorted({one for one in values if type(one) in (int, float)})
    flags = [one for one in values if isinstance(one, bool)]
    if any(isinstance(one, (dict, list)) for one in values):
        raise CannotNegateError("const")
    used = {type_of(one) for one in values}
    used |= {"number"} if numbers else set()
    options: list[Schema] = [_of_types([name for name in _TYPES if name not in used])]
    if texts:
        options.append({"type": "string", "pattern": f"^{_other_texts(texts)}$"})
    if numbers:
        options.append({"type": "number", "exclusiveMaximum": numbers[0]})
        options.append({"type": "number", "exclusiveMinimum": numbers[-1]})
        for low, high in itertools.pairwise(numbers):
            options.append({"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high})
    if flags:
        options += [{"const": one} for one in (True, False) if one not in flags]
    return options


def _other_texts(texts: list[str]) -> str:
    """A regular expression of all texts but `texts`, character by character."""
    is_one = "" in texts
    ends: dict[str, list[str]] = {}
    for text in texts:
        if text:
            ends.setdefault(text[0], []).append(text[1:])
    options = [_escape(first) + _other_texts(rest) for first, rest in ends.items()]
    firsts = "".join(map(_escape, ends))
    options.append(f"[^{firsts}](?s:.)*" if ends else "(?s:.)+")
    return f"(?:{'|'.join(options)}){'' if is_one else '?'}"


def _escape(char: str) -> str:
    return "\\" + char if re.match(r"[\\^$.|?*+()\[\]{}\-&~/]", char) else char
