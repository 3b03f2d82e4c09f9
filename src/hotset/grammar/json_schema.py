"""From a JSON schema as its sender wrote it to one that llguidance follows."""

import json
from typing import Any

from hotset.foreign_text import parse_json
from hotset.grammar.exclusion import make_exclusive
from hotset.grammar.nodes import LISTED, NAMED, ONE, SchemaError, children, walk
from hotset.grammar.rewrite import EXACT_DIGITS, is_exact, refuse, rewrite, rewrite_conditions
from hotset.grammar.values import TYPES, type_of, without_endless

# Keywords that no grammar can express, unless a rewrite has replaced them.
_UNSUPPORTED = (*("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),)
_COUNT = "whole number, 0 or more"
# The type of each keyword's value. Before draft 6, an exclusive bound was a boolean.
_KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ONE, ("object", "boolean")),
    "items": ("object", "boolean", "array"),
    **dict.fromkeys((*LISTED, "enum"), ("array",)),
    **dict.fromkeys((*NAMED, "dependentRequired", "dependencies"), ("object",)),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), (_COUNT,)),
    **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), (_COUNT,)),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), ("number",)),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), ("number", "boolean")),
    **dict.fromkeys(("pattern", "format", "$ref"), ("string",)),
    "type": ("string", "array"),
    "required": ("array",),
    "uniqueItems": ("boolean",),
}


def prepare(text: str) -> str:
    """The schema to compile: each value that fits it fits the schema as it was.

    Some values that fit may be left out: `schema_rewrite` says which.

    Raises:
        SchemaError: the schema is malformed, has a keyword that no grammar can say, or no value
            fits it; one line with the place in the schema.
    """
    schema = parse_json(text)
    if not isinstance(schema, dict):
        raise SchemaError(f"it is of type {type_of(schema)}; expected an object")
    for one, path in walk(schema):
        _check_structure(one, path)
    schema.pop("x-guidance", None)  # options of llguidance's own
    for one, path in walk(schema):
        rewrite_conditions(one, path, schema)
    make_exclusive(schema)
    for one, path in walk(schema):
        rewrite(one, path, schema)
        for key in _UNSUPPORTED:
            if key in one:
                raise refuse(key, path)
    without_endless(schema)
    return json.dumps(schema)


def _check_structure(schema: dict[str, Any], path: str) -> None:
    for key, kinds in _KINDS.items():
        if key in schema and not _is_of(schema[key], kinds):
            found = type_of(schema[key])
            raise SchemaError(
                f"{key!r} at {path} is of type {found}; expected {' or '.join(kinds)}"
            )
    types = schema.get("type", [])
    for name in [types] if isinstance(types, str) else types:
        if not isinstance(name, str) or name not in TYPES:
            expected = ", ".join(sorted(TYPES))
            raise SchemaError(f"'type' at {path} is {name!r}; expected one of {expected}")
    for name in schema.get("required", ()):
        if not isinstance(name, str):
            raise SchemaError(f"'required' at {path} has {name!r} in it; expected names")
    for key in ("const", "enum"):
        if key in schema and (number := _beyond_exact(schema[key])) is not None:
            raise SchemaError(
                f"{key!r} at {path} has {number}, which cannot be kept exactly; expected numbers "
                f"of at most {EXACT_DIGITS} digits"
            )
    if "$id" in schema and path != "#":
        raise refuse("$id", path, "is supported at the root only")
    for place, key, step in children(schema):
        if not _is_of(place[key], ("object", "boolean")):
            found = type_of(place[key])
            raise SchemaError(
                f"{path}{step} is of type {found}; expected a schema, which is an object"
            )


def _beyond_exact(constant: Any) -> int | float | None:
    """The first number in a constant that the grammar would change; None without any."""
    todo = [constant]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, (int, float)) and not is_exact(one):
            return one
    return None


def _is_of(value: object, kinds: tuple[str, ...]) -> bool:
    found = type_of(value)
    if _COUNT in kinds:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return found in kinds or (found == "integer" and "number" in kinds)
