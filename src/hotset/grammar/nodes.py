"""The places of a JSON schema: where its schemas are, and what a reference points at."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any] | bool


class SchemaError(Exception):
    """A schema that cannot be followed. The message is one line, with the place in the schema."""


LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
ONE = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("items", "additionalItems", "unevaluatedItems", "contains", "not", "if", "then", "else"),
)
NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
# All keywords that rule values out, of any draft.
CONSTRAINTS = frozenset(
    (
        *("type", "const", "enum", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
        *("$ref", "$dynamicRef", "$recursiveRef", "pattern", "format", "minLength", "maxLength"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
        *("contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
        *("properties", "patternProperties", "additionalProperties", "required", "dependencies"),
        *("minProperties", "maxProperties", "propertyNames", "dependentRequired"),
        "dependentSchemas",
    )
)


def children(schema: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """The places of the schemas right below one: container, key in it, and path from the schema.

    A place may hold a value that is no schema; the caller checks.
    """
    for key in ONE:
        if isinstance(schema.get(key), (dict, bool)):
            yield schema, key, f"/{key}"
    for key in (*LISTED, "items"):
        if isinstance(some := schema.get(key), list):
            for i in range(len(some)):
                yield some, i, f"/{key}/{i}"
    for key in NAMED:
        if isinstance(some := schema.get(key), dict):
            for name in some:
                yield some, name, f"/{key}/{name}"


def walk(root: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each schema that is an object, once, with its path.

    These are the root, all schemas below it, and schemas elsewhere that references point at. A
    caller may change the schema that it was given last: its parts are found after that.
    """
    seen: set[int] = set()
    todo: list[tuple[Any, str]] = [(root, "#")]
    while todo:
        schema, path = todo.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema, path
        if isinstance(reference := schema.get("$ref"), str):
            todo.append((resolve(root, reference), reference))
        todo += [(place[key], path + step) for place, key, step in children(schema)]


def resolve(root: dict[str, Any], reference: str) -> Schema | None:
    """The schema at a JSON pointer (`#/...`); None where there is none, or it is no pointer."""
    if reference in ("#", "#/"):
        return root
    if not reference.startswith("#/"):
        return None
    found: Any = root
    for step in unquote(reference[2:]).split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found if isinstance(found, (dict, bool)) else None
