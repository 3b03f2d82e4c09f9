"""Replaces keywords that a grammar does not have by keywords that it has.

A rewrite keeps the schema's values, or leaves some out where its docstring says so. It never adds a
value that does not fit the original schema.
"""

import itertools
import math
import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from hotset.grammar.negation import CannotNegateError, negate
from hotset.grammar.nodes import CONSTRAINTS, Schema, SchemaError, resolve
from hotset.grammar.values import identity

Node = dict[str, Any]

# As llguidance has them; others are annotations, as the standard has it.
_FORMATS = {"duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
# No leap second, which many readers do not take, and no more digits than microseconds have.
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_PATTERNS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}"}

_LOOKS = ("(?=", "(?!", "(?<=", "(?<!")
# "Not only these characters", as pydantic has it: the same as one that is none of them.
_NOT_ONLY = re.compile(r"^\^\(\?!\^\[([^\]\\]*)\]\*\$\)")
# Digits and a point, bounded together, by pydantic. Redundant where the parts add up to no more.
_AT_MOST = re.compile(r"\(\?=\[\\d\.\]\{1,(\d+)\}0\*\$\)(?=\\d\{0,(\d+)\}\\\.\\d\{0,(\d+)\}0\*\$)")
# llguidance reads numbers as floats, and longer numbers not to the last bit.
EXACT_DIGITS, _MOST_EXACT, _MOST_SMALL = 15, 2**53, 22
# Beyond, llguidance has no expression for a bound.
_MOST_NUMBER = 10**18
_MOST_UNIQUE = 6  # constants; each set of them becomes an option
_MOST_CONTAINED, _MOST_BEFORE = 16, 7


def rewrite_conditions(schema: Node, path: str, root: Node) -> None:
    """Replace `not`, `if`, `then` and `else` of one schema by other keywords, in place.

    This keeps all values. It runs before rewrites that leave values out: their opposite would add
    some.

    Raises:
        SchemaError: the opposite cannot be said; one line with the path.
    """
    if "not" in schema:
        _and(schema, _negated(schema.pop("not"), "not", path, root))
    if "if" in schema and {"then", "else"} & schema.keys():
        condition = schema.pop("if")
        otherwise = _negated(condition, "if", path, root)
        then, other = schema.pop("then", True), schema.pop("else", True)
        _and(schema, {"anyOf": [{"allOf": [condition, then]}, {"allOf": [otherwise, other]}]})
    for key in ("if", "then", "else"):
        schema.pop(key, None)


def rewrite(schema: Node, path: str, root: Node) -> None:
    """Replace keywords of one schema that a grammar has not, in place; not of schemas below it.

    Raises:
        SchemaError: one cannot be said so; one line with its path.
    """
    for step in (
        _drop_what_says_nothing,
        _rewrite_format,
        _rewrite_pattern,
        _rewrite_bounds,
        _rewrite_names,
        _rewrite_properties,
        _rewrite_contains,
        _rewrite_unique_items,
    ):
        step(schema, path, root)


def refuse(keyword: str, path: str, why: str = "is not supported") -> SchemaError:
    """The error for a keyword."""
    return SchemaError(f"{keyword!r} at {path} {why}")


def _drop_what_says_nothing(schema: Node, path: str, root: Node) -> None:
    for key in ("uniqueItems", "minContains", "maxContains"):
        if schema.get(key) is False or ("Contains" in key and "contains" not in schema):
            schema.pop(key, None)
    for key in ("propertyNames", "unevaluatedItems", "unevaluatedProperties", "dependencies"):
        if schema.get(key) in (True, {}):
            del schema[key]
    in_place = {"$ref", "allOf", "anyOf", "oneOf", "dependentSchemas"} & schema.keys()
    for key, simple in (
        ("unevaluatedProperties", "additionalProperties"),
        ("unevaluatedItems", "items"),
    ):
        if key in schema and not in_place:  # nothing else could have evaluated them
            schema.setdefault(simple, schema[key])
            del schema[key]


def _rewrite_format(schema: Node, path: str, root: Node) -> None:
    name = schema.get("format")
    if name is None or name in _FORMATS:
        return
    del schema["format"]
    if name in _PATTERNS:
        _and(schema, {"pattern": f"^(?:{_PATTERNS[name]})$"})


def _rewrite_pattern(schema: Node, path: str, root: Node) -> None:
    pattern = schema.get("pattern")
    if not isinstance(pattern, str) or not any(look in pattern for look in _LOOKS):
        return
    if found := _NOT_ONLY.match(pattern):
        pattern = "^" + pattern[found.end() :]
        _and(schema, {"pattern": f"[^{found[1]}]"})
    pattern = _AT_MOST.sub(
        lambda m: "" if int(m[1]) > int(m[2]) + int(m[3]) else m[0],
        pattern,
    )
    if any(look in pattern for look in _LOOKS):
        raise refuse("pattern", path, "looks ahead or behind, which is not supported")
    schema["pattern"] = pattern


def _rewrite_bounds(schema: Node, path: str, root: Node) -> None:
    """Leaves out numbers beyond 10**18, and those between a bound and the next of 15 digits."""
    for key, sign in (
        *(("minimum", -1), ("exclusiveMinimum", -1)),
        *(("maximum", 1), ("exclusiveMaximum", 1)),
    ):
        value = schema.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if sign * value > _MOST_NUMBER:
            schema[key] = sign * _MOST_NUMBER
        elif sign * value < -_MOST_NUMBER:
            raise refuse(key, path, f"is {value}; expected a number of at most 18 digits")
        elif abs(value) >= 10**EXACT_DIGITS or not is_exact(value):
            schema[key] = _exact_within(value, sign, is_exclusive=key.startswith("exclusive"))
        if key.startswith("exclusive") and schema.get("type") != "integer":
            schema[key] = _just_within(schema[key], sign)


def is_exact(number: int | float) -> bool:
    """Whether a grammar has exactly this number."""
    if math.isfinite(number) and number == int(number):
        return abs(number) <= _MOST_EXACT
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    return len(digits) <= EXACT_DIGITS and isinstance(exponent, int) and exponent >= -_MOST_SMALL


def _exact_within(bound: int | float, sign: int, *, is_exclusive: bool) -> int | float:
    """A bound that is exact, close to `bound` and no wider; `sign` is 1 for upper ones."""
    context = Context(EXACT_DIGITS, ROUND_FLOOR if sign > 0 else ROUND_CEILING)
    near = context.create_decimal(repr(bound))
    if is_exclusive and abs(bound) >= 10**EXACT_DIGITS:  # one more or less is lost in these
        near = near.next_minus(context) if sign > 0 else near.next_plus(context)
    return int(near) if near == int(near) else float(near)


def _just_within(bound: int | float, sign: int) -> int | float:
    """An exclusive bound that is not whole: of a whole one, llguidance may let the number through.

    It does where the other bound is within the same whole numbers, as for 7 and 7.5.
    """
    num_digits = len(str(abs(int(bound))))
    if bound != int(bound) or num_digits >= EXACT_DIGITS:
        return bound
    return float(Decimal(int(bound)) - sign * Decimal(10) ** (num_digits - EXACT_DIGITS))


def _rewrite_names(schema: Node, path: str, root: Node) -> None:
    """`propertyNames`, where all properties are named by it."""
    if "propertyNames" not in schema:
        return
    names = resolved(schema["propertyNames"], root)
    checks = names.keys() & CONSTRAINTS - {"type"} if isinstance(names, dict) else set()
    if isinstance(names, dict) and names.get("type", "string") != "string":
        raise refuse("propertyNames", path, "has a type that no name has")
    if names is False:
        _and(schema, {"maxProperties": 0})
    elif isinstance(names, dict) and checks and checks <= {"enum", "const"}:
        allowed = names["enum"] if "enum" in names else [names["const"]]
        if len(checks) > 1 or "patternProperties" in schema:
            raise refuse("propertyNames", path, "is not supported together with what is beside it")
        rest = schema.get("additionalProperties", True)
        named = {name: False for name in schema.get("properties", {}) if name not in allowed}
        for name in allowed:
            if isinstance(name, str):
                named[name] = schema.get("properties", {}).get(name, rest)
        schema["properties"], schema["additionalProperties"] = named, False
    elif isinstance(names, dict) and not {"properties", "patternProperties"} & schema.keys():
        if checks != {"pattern"} and not {"minLength", "maxLength"} >= checks > set():
            raise refuse("propertyNames", path, "is not supported but for one pattern, or lengths")
        least, most = names.get("minLength", 0), names.get("maxLength", "")
        pattern = names.get("pattern", f"^(?s:.){{{least},{most}}}$")
        if any(look in pattern for look in _LOOKS):
            raise refuse("propertyNames", path, "has a pattern that is not supported")
        schema["patternProperties"] = {pattern: schema.get("additionalProperties", True)}
        schema["additionalProperties"] = False
    elif names is not True and checks:
        raise refuse("propertyNames", path)
    del schema["propertyNames"]


def _rewrite_properties(schema: Node, path: str, root: Node) -> None:
    """Rules of one property about others. `minProperties` 1 then means one of the named ones."""
    dependencies = {
        **_object(schema, "dependencies", path),
        **_object(schema, "dependentRequired", path),
        **_object(schema, "dependentSchemas", path),
    }
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        schema.pop(key, None)
    for name, needed in dependencies.items():
        then = {"required": needed} if isinstance(needed, list) else needed
        _and(schema, {"anyOf": [{"properties": {name: False}}, then]})
    properties, required = schema.get("properties"), schema.get("required") or ()
    if schema.get("minProperties") == 1 and "maxProperties" not in schema and properties:
        del schema["minProperties"]
        if not required:
            _and(schema, {"anyOf": [{"required": [name]} for name in properties]})


def _negated(schema: Schema, keyword: str, path: str, root: Node) -> Schema:
    try:
        return negate(schema, root)
    except CannotNegateError as error:
        raise refuse(keyword, path, f"has {str(error)!r} in it, which is not supported") from error


def _rewrite_contains(schema: Node, path: str, root: Node) -> None:
    """What an array contains is among its first items."""
    if "contains" not in schema:
        return
    if "maxContains" in schema:
        raise refuse("maxContains", path)
    item, number = schema.pop("contains"), schema.pop("minContains", 1)
    if number > _MOST_CONTAINED:
        raise refuse("minContains", path, f"is {number}; expected at most {_MOST_CONTAINED}")
    if number:
        options: list[Schema] = [
            {
                "type": "array",
                "prefixItems": [True] * before + [item] * number,
                "minItems": before + number,
            }
            for before in range(_MOST_BEFORE + 1)
        ]
        _and(schema, {"anyOf": [*options, {"type": _OTHER_THAN_ARRAY}]})


def _rewrite_unique_items(schema: Node, path: str, root: Node) -> None:
    """Sets of few constants, in the order in which the schema names them."""
    if "uniqueItems" not in schema:
        return
    most, least = schema.get("maxItems"), schema.get("minItems", 0)
    items = resolved(schema.get("items"), root)
    values = items.get("enum") if isinstance(items, dict) else None
    if isinstance(items, dict) and items.get("type") == "boolean":
        values = [False, True]
    if isinstance(most, int) and most <= 1:
        del schema["uniqueItems"]
    elif isinstance(values, list) and len(values) <= _MOST_UNIQUE and "prefixItems" not in schema:
        values = list({identity(one): one for one in values}.values())
        most = len(values) if most is None else most
        sets = [
            some
            for size in range(least, min(most, len(values)) + 1)
            for some in itertools.combinations(values, size)
        ]
        del schema["uniqueItems"]
        options = [
            {
                "type": "array",
                "prefixItems": [{"const": one} for one in some],
                "minItems": len(some),
                "maxItems": len(some),
            }
            for some in sets
        ]
        _and(schema, {"anyOf": [*options, {"type": _OTHER_THAN_ARRAY}]})
    elif isinstance(values, list):
        raise refuse(
            "uniqueItems",
            path,
            f"has {len(values)} constants to choose from; expected at most {_MOST_UNIQUE}",
        )
    else:  # `UniqueItems` looks after them
        del schema["uniqueItems"]


_OTHER_THAN_ARRAY = ["null", "boolean", "number", "string", "object"]


def resolved(schema: Any, root: Node) -> Any:
    """The schema that a bare reference points at."""
    for _ in range(8):
        if not isinstance(schema, dict) or schema.keys() & CONSTRAINTS != {"$ref"}:
            return schema
        schema = resolve(root, schema["$ref"])
    return None


def _object(schema: Node, key: str, path: str) -> Node:
    value = schema.get(key, {})
    if not isinstance(value, dict):
        raise refuse(key, path, "is no object")
    return value


def _and(schema: Node, other: Schema) -> None:
    """Let `other` hold too."""
    schema["allOf"] = [*schema.get("allOf", ()), other]
