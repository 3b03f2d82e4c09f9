"""Which JSON schemas have a value at all: one that ends."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hotset.grammar.nodes import Schema, SchemaError, children, resolve, walk

TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_MAX_GOALS = 5000
_MAX_ALL_GOALS = 30_000
_MAX_OPENED, _MAX_ALL_OPENED = 10_000, 300_000  # schemas, for one answer and for all
_MOST_STEPS = 12  # of a path that is shown
_MAX_ALTERNATIVES = 64
_MAX_DEPTH = 64  # of references and allOf within each other, with no value in between

Flat = tuple[dict[str, Any], ...]  # schemas that hold together, references and allOf opened up
Goal = tuple[int, ...]  # ids of schemas that one value has to fit, all of them


class _TooComplexError(Exception):
    """The limits were reached before an answer was found."""


class SchemaValues:
    """Tells schemas without a value from schemas that may have one.

    A value that requires itself without end does not count. The answer "no" is proven; "yes" means
    that no contradiction was found.

    A set of schemas that hold together has a value if the schemas of their required properties and
    items have one: the least fixed point of that rule is computed over the sets that are met.

    Args:
        root: where references look. It must not change meanwhile.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._schemas: dict[int, Schema] = {}
        self._known: dict[Goal, bool] = {}
        self._num_looked_at = self._num_opened = self._most_opened = 0

    def has_value(self, *schemas: Schema) -> bool:
        """Whether there may be a value that fits all of `schemas`."""
        goal = self._goal(schemas)
        if goal not in self._known:
            try:
                self._find_out(goal)
            except (_TooComplexError, RecursionError):
                self._known[goal] = True
        return self._known[goal]

    def where_endless(self, schema: Schema) -> str:
        """The path, through required parts, to where a schema without a value comes to its end."""
        path, seen, goal = "#", set(), self._goal((schema,))
        while goal not in seen and path.count("/") < _MOST_STEPS:
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
        return tuple(sorted(some))

    def _find_out(self, goal: Goal) -> None:
        """Fill in `_known` for a goal and what it leads to."""
        self._most_opened = min(self._num_opened + _MAX_OPENED, _MAX_ALL_OPENED)
        ways: dict[Goal, list[list[Goal]]] = {}
        todo = [goal]
        while todo:
            one = todo.pop()
            if one in ways or one in self._known:
                continue
            self._num_looked_at += 1
            if len(ways) > _MAX_GOALS or self._num_looked_at > _MAX_ALL_GOALS:
                raise _TooComplexError
            ways[one] = self._ways(one)
            if [] not in ways[one]:
                todo += [part for way in ways[one] for part in way]
        reached: set[Goal] = set()
        changed = True
        while changed:
            changed = False
            for one in reversed(ways):  # what is met later is needed by what is met before
                if one not in reached and any(
                    all(part in reached or self._known.get(part, False) for part in way)
                    for way in ways[one]
                ):
                    reached.add(one)
                    changed = True
        self._known.update((one, one in reached) for one in ways)

    def _ways(self, goal: Goal) -> list[list[Goal]]:
        """What has to have a value for `goal` to have one: any of these lists, all of it."""
        ways: list[list[Goal]] = []
        for alternative in self._alternatives(goal):
            if not alternative:
                return [[]]
            types = _types_of(alternative)
            values = _constants_of(alternative)
            if values is not None:
                if any(_fits(value, alternative, types) for value in values):
                    return [[]]
                continue
            for kind in types:
                if not _type_has_value(kind, alternative):
                    continue
                if kind not in ("array", "object"):
                    return [[]]
                ways.append([part for _, part in self._parts(alternative, kind)])
        return ways

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
        self._num_opened += 1
        if self._num_opened > self._most_opened or len(path) > _MAX_DEPTH:
            raise _TooComplexError
        path = path | {id(schema)}
        groups: list[list[Flat]] = []
        if isinstance(reference := schema.get("$ref"), str):
            target = resolve(self._root, reference)
            groups.append([()] if target is None else self._open(target, path))
        groups += [self._open(one, path) for one in _list(schema, "allOf")]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                groups.append([way for one in _list(schema, key) for way in self._open(one, path)])
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
        SchemaError: no value fits `root` itself; one line says where.
    """
    values = SchemaValues(root)
    if not values.has_value(root):
        where = values.where_endless(root)
        raise SchemaError(
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
