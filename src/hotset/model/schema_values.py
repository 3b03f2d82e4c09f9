"""Which JSON schemas have a value at all: one that ends."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hotset.model.schema_nodes import Schema, children, resolve, walk

TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_MAX_GOALS = 2000
_MAX_ALTERNATIVES = 64

Flat = tuple[dict[str, Any], ...]  # schemas that hold together, references and allOf opened up
Goal = tuple[int, ...]  # ids of schemas that one value has to fit, all of them


class _TooComplexError(Exception):
    """What a schema means was not found within the limits."""


class SchemaValues:
    """Tells schemas without a value from those that may have one.

    A value that requires itself without end is none. The answer "no" is proven; "yes" means that
    nothing was found that rules all values out.

    A set of schemas that hold together has a value if those of their required properties and items
    have one: the least fixed point of that rule is computed over the sets that are met.

    Args:
        root: where references look. It must not change meanwhile.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._schemas: dict[int, Schema] = {}
        self._known: dict[Goal, bool] = {}

    def has_value(self, *schemas: Schema) -> bool:
        """Whether there may be a value that fits all of `schemas`."""
        goal = self._goal(schemas)
        try:
            changed = not self._known.get(goal, False)
            while changed:
                num_known, changed = len(self._known), False
                for one in list(self._known):
                    if not self._known[one] and self._holds(one):
                        self._known[one] = changed = True
                changed = (changed or len(self._known) > num_known) and not self._known[goal]
                if len(self._known) > _MAX_GOALS:
                    raise _TooComplexError
        except (_TooComplexError, RecursionError):
            return True
        return self._known[goal]

    def where_endless(self, schema: Schema) -> str:
        """The path, through required parts, to where a schema without a value comes to its end."""
        path, seen, goal = "#", set(), self._goal((schema,))
        while goal not in seen:
            seen.add(goal)
            for alternative in self._alternatives(goal):
                for step, part in self._parts(alternative):
                    if not self._known.get(part, True):
                        path, goal = path + step, part
                        break
                break
        return path

    def _goal(self, schemas: Iterable[Schema]) -> Goal:
        some = {id(schema): schema for schema in schemas if schema is not True}
        self._schemas.update(some)
        goal = tuple(sorted(some))
        self._known.setdefault(goal, not goal)
        return goal

    def _holds(self, goal: Goal) -> bool:
        for alternative in self._alternatives(goal):
            types = _types_of(alternative)
            values = _constants_of(alternative)
            if values is not None:
                if any(_fits(value, alternative, types) for value in values):
                    return True
                continue
            if any(
                _type_has_value(kind, alternative) for kind in types - {"array", "object"}
            ) or any(
                kind in types
                and _type_has_value(kind, alternative)
                and all(self._known[part] for _, part in self._parts(alternative, kind))
                for kind in ("array", "object")
            ):
                return True
        return False

    def _alternatives(self, goal: Goal) -> Iterator[Flat]:
        opened = [self._open(self._schemas[one], frozenset()) for one in goal]
        for combination in itertools.product(*opened):
            yield tuple(itertools.chain.from_iterable(combination))

    def _open(self, schema: Schema, path: frozenset[int]) -> list[Flat]:
        """The ways to fit a schema: each a tuple of schemas without branches of their own.

        A schema that comes back to itself with no value in between has no way to fit.
        """
        if schema is False or id(schema) in path:
            return []
        if not isinstance(schema, dict):
            return [()]
        path = path | {id(schema)}
        groups: list[list[Flat]] = []
        if isinstance(reference := schema.get("$ref"), str):
            target = resolve(self._root, reference)
            groups.append([()] if target is None else self._open(target, path))
        if isinstance(some := schema.get("allOf"), list):
            groups += [self._open(one, path) for one in some]
        for key in ("anyOf", "oneOf"):
            if isinstance(some := schema.get(key), list):
                groups.append([way for one in some for way in self._open(one, path)])
        ways: list[Flat] = [(schema,)]
        for group in groups:
            ways = [(*way, *more) for way in ways for more in group]
            if len(ways) > _MAX_ALTERNATIVES:
                raise _TooComplexError
        return ways

    def _parts(self, flat: Flat, kind: str | None = None) -> list[tuple[str, Goal]]:
        """What a value must have inside: a step of the path, and what has to fit there."""
        parts = []
        if kind != "array" and (kind == "object" or "object" in _types_of(flat)):
            names = [name for one in flat for name in _list(one, "required")]
            for name in dict.fromkeys(names):
                parts.append((f"/{name}", self._goal(_property(flat, name))))
        if kind != "object" and (kind == "array" or "array" in _types_of(flat)):
            least = int(max((_number(one, "minItems", 0) for one in flat), default=0))
            longest = max((len(_list(one, "prefixItems")) for one in flat), default=0)
            for i in range(min(least, longest + 1)):
                parts.append((f"/{i}", self._goal(_item(flat, i))))
        return parts


def without_endless(root: dict[str, Any]) -> None:
    """Replace each schema below `root` that has no value by false, in place.

    A grammar would lead into it, and there would be no way out.

    Raises:
        ValueError: no value fits `root` itself; one line says where.
    """
    values = SchemaValues(root)
    if not values.has_value(root):
        where = values.where_endless(root)
        raise ValueError(
            f"no value can fit it: what is required at {where} contradicts itself or needs itself "
            "again without end"
        )
    places = [place for schema, _ in walk(root) for place in children(schema)]
    endless = [(some, key) for some, key, _ in places if not values.has_value(some[key])]
    for some, key in endless:
        some[key] = False


def _types_of(flat: Flat) -> frozenset[str]:
    types = TYPES
    for schema in flat:
        named = schema.get("type")
        if isinstance(named, str):
            named = [named]
        if isinstance(named, list):
            allowed = {name for name in named if isinstance(name, str)}
            types &= allowed | ({"integer"} if "number" in allowed else set())
    return types


def _constants_of(flat: Flat) -> list[Any] | None:
    """The constants that are left, or None where no schema names any."""
    sets = [[schema["const"]] for schema in flat if "const" in schema]
    sets += [schema["enum"] for schema in flat if isinstance(schema.get("enum"), list)]
    if not sets:
        return None
    others = [{identity(value) for value in some} for some in sets[1:]]
    return [value for value in sets[0] if all(identity(value) in some for some in others)]


def identity(value: Any) -> str:
    """Equal for equal JSON values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(map(identity, value)) + "]"
    if isinstance(value, dict):
        inner = sorted((key, identity(one)) for key, one in value.items())
        return "{" + ",".join(f"{json.dumps(key)}:{one}" for key, one in inner) + "}"
    return json.dumps(value)


def _fits(value: Any, flat: Flat, types: frozenset[str]) -> bool:
    if type_of(value) not in types:
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = _bounds(flat)
        return least <= value <= most
    if isinstance(value, dict) and any(
        name not in value for one in flat for name in _list(one, "required")
    ):
        return False
    for kind, what in ((str, "Length"), (list, "Items"), (dict, "Properties")):
        if isinstance(value, kind):
            least, most = _range(flat, f"min{what}", f"max{what}")
            return least <= len(value) <= most
    return True


def type_of(value: Any) -> str:
    """The name JSON schema has for a value's type, `integer` for whole numbers."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def _type_has_value(kind: str, flat: Flat) -> bool:
    least: float
    most: float
    match kind:
        case "integer" | "number":
            least, most = _bounds(flat)
        case "string":
            least, most = _range(flat, "minLength", "maxLength")
        case "array":
            least, most = _range(flat, "minItems", "maxItems")
        case "object":
            least, most = _range(flat, "minProperties", "maxProperties")
            least = max(least, len({name for one in flat for name in _list(one, "required")}))
        case _:
            return True
    return least <= most


def _bounds(flat: Flat) -> tuple[float, float]:
    """Least and most; a bound that is excluded counts as one that is not."""
    least = max(
        _number(one, key, -float("inf")) for one in flat for key in ("minimum", "exclusiveMinimum")
    )
    most = min(
        _number(one, key, float("inf")) for one in flat for key in ("maximum", "exclusiveMaximum")
    )
    return least, most


def _range(flat: Flat, least: str, most: str) -> tuple[float, float]:
    return (
        max(_number(one, least, 0) for one in flat),
        min(_number(one, most, float("inf")) for one in flat),
    )


def _property(flat: Flat, name: str) -> Iterator[Schema]:
    for schema in flat:
        named = schema.get("properties") or {}
        is_named = name in named
        if is_named:
            yield named[name]
        for pattern, one in (schema.get("patternProperties") or {}).items():
            matches = _matches(pattern, name)
            is_named = is_named or matches is not False
            if matches:
                yield one
        if not is_named:
            yield schema.get("additionalProperties", True)


def _item(flat: Flat, index: int) -> Iterator[Schema]:
    for schema in flat:
        first = _list(schema, "prefixItems")
        rest = schema.get("items", True)
        if isinstance(rest, list):  # as drafts before 2020-12 have it
            first, rest = rest, schema.get("additionalItems", True)
        yield first[index] if index < len(first) else rest


def _matches(pattern: str, name: str) -> bool | None:
    """None where it cannot be told."""
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return None


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _number(schema: dict[str, Any], key: str, default: float) -> float:
    value = schema.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number else default  # type: ignore[return-value]
