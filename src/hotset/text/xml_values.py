"""Values of calls that are written as XML: text, whose type is what the tool's schema says."""

import ast
import json
from decimal import Decimal
from typing import Any

from hotset.foreign_text import parse_json
from hotset.grammar.nodes import resolve
from hotset.grammar.values import type_of

Json = dict[str, Any]

_PYTHON = {"none": "null", "true": "true", "false": "false", "null": "null"}


def types_of(parameters: Json, name: str) -> frozenset[str]:
    """The types that a parameter may have; empty where the schema does not say."""
    properties = parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, dict) else None
    return _types(schema, parameters, 8)


def _types(schema: Any, root: Json, depth: int) -> frozenset[str]:
    if not isinstance(schema, dict) or not depth:
        return frozenset()
    if isinstance(named := schema.get("type"), (str, list)):
        return frozenset([named] if isinstance(named, str) else map(str, named))
    if "const" in schema:
        return frozenset([type_of(schema["const"])])
    if isinstance(values := schema.get("enum"), list):
        return frozenset(map(type_of, values))
    if isinstance(reference := schema.get("$ref"), str):
        return _types(resolve(root, reference), root, depth - 1)
    found: frozenset[str] = frozenset()
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(some := schema.get(key), list):
            found |= frozenset().union(*(_types(one, root, depth - 1) for one in some))
    return found


def to_json(text: str, types: frozenset[str]) -> str:
    """A value as JSON: of one of `types` if `text` can be read so, otherwise as a string.

    Templates write true, false and null as Python does, or as JSON does.
    """
    stripped = text.strip()
    for candidate in (_PYTHON.get(stripped.lower(), stripped), _from_python(stripped)):
        try:
            value = parse_json(candidate, check_unicode=True)
            kind = type_of(value)
            if kind != "string" and (kind in types or (kind == "integer" and "number" in types)):
                if "number" not in types and isinstance(value, float):
                    value = int(Decimal(candidate))  # 3.0 where an integer belongs, exactly
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:  # it is no JSON, or a number that JSON cannot say, such as 1e999
            continue
    return json.dumps(text, ensure_ascii=False)


def _from_python(text: str) -> str:
    """The JSON of a list or dict in Python's notation; empty if it is none."""
    if text[:1] not in ("[", "{"):
        return ""
    try:
        return json.dumps(ast.literal_eval(text), allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ""
