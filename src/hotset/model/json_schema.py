"""From a JSON schema as its sender wrote it to one that llguidance follows."""

import json
from typing import Any

from hotset.foreign_text import parse_json
from hotset.model.schema_nodes import LISTED, NAMED, ONE, children, walk
from hotset.model.schema_values import type_of, without_endless


def prepare(text: str) -> str:
    """The schema to compile: one of the same values, as far as a grammar can tell.

    Raises:
        ValueError: the schema is malformed, or no value fits it; one line.
    """
    schema = parse_json(text)
    if not isinstance(schema, dict):
        raise ValueError(f"it is of type {type_of(schema)}; expected an object")
    for one, path in walk(schema):
        _check_structure(one, path)
    without_endless(schema)
    return json.dumps(schema)


def _check_structure(schema: dict[str, Any], path: str) -> None:
    for key in (*ONE, *LISTED, *NAMED):
        kinds: tuple[type, ...] = (dict, bool) if key in ONE else (list if key in LISTED else dict,)
        if key == "items":
            kinds = (dict, bool, list)
        if key in schema and not isinstance(schema[key], kinds):
            found = type_of(schema[key])
            raise ValueError(f"{key!r} at {path} is of type {found}; expected {_name(kinds)}")
    for place, key, step in children(schema):
        if not isinstance(place[key], (dict, bool)):
            found = type_of(place[key])
            raise ValueError(
                f"{path}{step} is of type {found}; expected a schema, which is an object"
            )


def _name(kinds: tuple[type, ...]) -> str:
    names = {dict: "object", bool: "boolean", list: "array"}
    return " or ".join(names[kind] for kind in kinds)
