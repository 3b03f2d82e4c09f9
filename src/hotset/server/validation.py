"""What is wrong with a body, in words of ours: the field, its value and what was expected."""

import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hotset.errors import RequestError

_SHOWN_CHARS = 60

# Type of pydantic's error -> what was expected, with the values of its context.
_TYPES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "an object",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
}
_VALUES = {
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "invalid_key": "strings as names",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "list_type": "a list",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "a string that fits {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_unicode": "valid Unicode",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
}
_UNKNOWN = "what /openapi.json says of it"

Path = tuple[str | int, ...]


def explain(error: ValidationError, data: object) -> RequestError:
    """The one line about a body that did not pass its schema.

    Args:
        error: of the schema.
        data: the body.
    """
    # A union has errors for each of its branches; the first one is where the branch ended.
    firsts: dict[Path, tuple[Path, ErrorDetails]] = {}
    field: Path | None = None
    for one in error.errors(include_url=False):
        path, branch = _path(one, data)
        field = path[:1] if field is None else field
        if path[:1] == field:
            firsts.setdefault(branch, (path, one))
    # The branch that got furthest is what was meant.
    path, first = max(firsts.values(), key=lambda pair: _reach(pair[0]))
    name = ".".join(map(str, path))
    kind, context = first["type"], first.get("ctx", {})
    if kind == "value_error":  # raised by a check of ours
        return RequestError(str(context["error"]), param=name or None)
    if kind == "union_tag_invalid":
        name = f"{name}.type"
        message = f"{name} is {shown(context['tag'])}; expected {context['expected_tags']}"
        return RequestError(message, param=name)
    if kind == "union_tag_not_found":
        name, kind = f"{name}.type", "missing"
    if kind == "missing":
        return missing(name)
    if kind == "extra_forbidden" or (kind == "too_long" and context["max_length"] == 0):
        return RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
    expected = dict.fromkeys(_expected(one) for at, one in firsts.values() if at == path)
    code = "invalid_type" if kind in _TYPES else "invalid_value"
    return RequestError(
        f"{name or 'the body'} is {shown(first['input'])}; expected {' or '.join(expected)}",
        param=name or None,
        code=code,
    )


def missing(name: str, expected: str = "") -> RequestError:
    """The refusal of a body without a field."""
    message = f"{name} is missing{expected and '; expected '}{expected}"
    return RequestError(message, param=name, code="missing_required_parameter")


def shown(value: object) -> str:
    """A value of a body as a message shows it: JSON, cut where it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return "not JSON"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _expected(error: ErrorDetails) -> str:
    text = _TYPES.get(error["type"]) or _VALUES.get(error["type"], _UNKNOWN)
    return text.format(**error.get("ctx", {}))


def _path(error: ErrorDetails, data: object) -> tuple[Path, Path]:
    """The fields and indices that lead to an error, and the branches of unions it is in."""
    path: list[str | int] = []
    value: Any = data
    branch: Path = ()
    for i, part in enumerate(error["loc"], 1):
        if i == len(error["loc"]) and error["type"] in _TYPES and value == error["input"]:
            branch += (part,)  # which may also be the name of a field
            break
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            value = value[part]
            path.append(part)
        else:
            branch += (part,)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path), branch


def _reach(path: Path) -> tuple[int, int]:
    return len(path), path[-1] if path and isinstance(path[-1], int) else -1
