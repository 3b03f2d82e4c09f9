"""`oneOf`: its branches told apart, so that no value fits two of them."""

from typing import Any

from hotset.grammar.nodes import Schema, resolve, walk
from hotset.grammar.rewrite import refuse, resolved
from hotset.grammar.values import SchemaValues, identity


def make_exclusive(root: dict[str, Any]) -> None:
    """Replace each `oneOf` below `root` by an `anyOf` that has no value of two branches, in place.

    Where a property is required by one branch and allowed by another, the other goes without it.

    Raises:
        SchemaError: two branches may both fit a value; one line says which and where.
    """
    values = SchemaValues(root)
    # Each `oneOf` is told apart by the schema as it was, before others lost properties.
    found: list[tuple[dict[str, Any], list[Schema]]] = []
    for schema, path in walk(root):
        if "oneOf" not in schema:
            continue
        if _is_told_apart(schema["oneOf"], root):
            found.append((schema, schema["oneOf"]))
            continue
        branches = [one for one in schema["oneOf"] if values.has_value(one)]
        apart = [
            _without(branches, i, root, values) if _overlaps(values, branches, i) else branch
            for i, branch in enumerate(branches)
        ]
        for i, j in _pairs(len(apart)):
            if values.has_value(apart[i], apart[j]):
                first, second = (schema["oneOf"].index(branches[one]) for one in (i, j))
                raise refuse(
                    "oneOf",
                    path,
                    f"has branches {first} and {second} that may both fit one value: tell them "
                    "apart by a type or a required constant, or use anyOf",
                )
        found.append((schema, apart))
    for schema, apart in found:
        del schema["oneOf"]
        if "anyOf" in schema:
            schema["allOf"] = [*schema.get("allOf", ()), {"anyOf": apart}]
        else:
            schema["anyOf"] = apart


def _is_told_apart(branches: list[Schema], root: dict[str, Any]) -> bool:
    """Whether branches are different constants, or require a property whose constant differs.

    Most schemas are so, and it is seen without comparing each branch with each.
    """
    targets = [resolved(branch, root) for branch in branches]
    constants = [one for target in targets for one in _constants(target)]
    if all(map(_constants, targets)):
        return len(set(constants)) == len(constants)
    if not all(isinstance(target, dict) and target.get("type") == "object" for target in targets):
        return False
    for name in _required(targets[0], root):
        seen: set[str] = set()
        for target in targets:
            property_ = (target.get("properties") or {}).get(name)
            constant = property_.get("const") if isinstance(property_, dict) else None
            if constant is None or name not in _required(target, root):
                break
            seen.add(identity(constant))
        else:
            return len(seen) == len(targets)
    return False


def _constants(schema: Any) -> list[str]:
    if not isinstance(schema, dict):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return [identity(value) for value in values]


def _pairs(number: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(number) for j in range(i + 1, number)]


def _overlaps(values: SchemaValues, branches: list[Schema], i: int) -> bool:
    return any(j != i and values.has_value(branches[i], one) for j, one in enumerate(branches))


def _without(branches: list[Schema], i: int, root: dict[str, Any], values: SchemaValues) -> Schema:
    """Branch `i` without a property that each branch it overlaps with requires."""
    own = _required(branches[i], root)
    without: dict[str, Schema] = {}
    for j, other in enumerate(branches):
        if j != i and values.has_value(branches[i], other):
            names = [name for name in _required(other, root) if name not in own]
            if names:
                without[names[0]] = False
    return {"allOf": [branches[i], {"properties": without}]} if without else branches[i]


def _required(schema: Schema, root: dict[str, Any], depth: int = 8) -> list[str]:
    if not isinstance(schema, dict) or not depth:
        return []
    names = [name for name in schema.get("required") or () if isinstance(name, str)]
    if isinstance(reference := schema.get("$ref"), str):
        names += _required(resolve(root, reference) or {}, root, depth - 1)
    for one in schema.get("allOf") or ():
        names += _required(one, root, depth - 1)
    return names
