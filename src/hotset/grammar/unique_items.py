"""Keeps items of an array and names of an object apart, which no grammar can.

Items are followed for `uniqueItems`, and names where a schema counts the properties of an object.

A token that would end an item equal to an earlier one is ruled out while other tokens are left.
Texts and numbers can always go on. Where no other token was left, the output ends with an error, so
no output with equal items passes.
"""

import copy
import re
from dataclasses import dataclass, replace
from typing import Any, Self

from hotset.errors import HotsetError
from hotset.foreign_text import parse_json
from hotset.grammar.follower import COMMA, QUOTE, JsonFollower, Mask, TokenTable
from hotset.grammar.nodes import resolve, walk
from hotset.grammar.values import identity

Node = dict[str, Any]

_SPACE, _ENDS = b" \n\r\t", (b",", b"]", b" ", b"\n")
_LIST, _OBJECT = b"[{"


def has_unique_items(root: Node) -> bool:
    """Whether a schema asks for it anywhere, or counts properties."""
    return any(schema.get("uniqueItems") is True for schema, _ in walk(root)) or _counts_names(root)


def _counts_names(root: Node) -> bool:
    """Whether it matters that a name is there twice: the properties are fewer then."""
    schemas = [schema for schema, _ in walk(root)]
    has_opposites = any({"not", "if"} & schema.keys() for schema in schemas)
    return any(
        schema.get("minProperties", 0) > 1 or (has_opposites and "maxProperties" in schema)
        for schema in schemas
    )


@dataclass(slots=True)
class _Container:
    """An array or object that is open.

    Attributes:
        nodes: the schemas that may apply to it.
        key: of the property that is being written; None while a key is.
        seen: identity -> text of the items or names so far; None where equal ones may be.
        item: the bytes of the item or name that is being written.
    """

    is_list: bool
    nodes: list[Node]
    index: int = 0
    key: str | None = None
    seen: dict[str, bytes] | None = None
    item: bytes = b""
    path: str = ""


class UniqueItems(JsonFollower):
    """Follows one output through the places of its schema.

    Its `error` is one line, once an array has two equal items.

    Args:
        root: the schema.
        tokens: of the vocabulary.
    """

    def __init__(self, root: Node, tokens: TokenTable) -> None:
        super().__init__(tokens)
        self._root = root
        self._counts_names = _counts_names(root)
        _ = tokens.in_order  # here, and not in a step of the engine
        self._open: list[_Container] = []
        self._string = b""

    def copy(self) -> Self:
        """Another follower, at the same place of the output."""
        other = super().copy()
        other._open = [replace(one, seen=copy.copy(one.seen)) for one in self._open]
        return other

    @property
    def is_near(self) -> bool:
        """Whether the next token may end an item that is there already."""
        return any(one.seen and one.key is None for one in self._open)

    def keep_within(self, allowed: Mask) -> Mask:
        """The tokens of `allowed`, `[V]`, that do not end one; all of them if none is left."""
        kept = allowed.copy()
        for container in self._open:
            if container.key is not None:
                continue
            begun = container.item.lstrip(_SPACE)
            for text in (container.seen or {}).values():
                if not text.startswith(begun):
                    continue
                rest = text[len(begun) :]
                if text[-1:] in b'"]}':
                    endings = [rest] if rest else []
                else:  # a number may go on
                    endings = [rest + end for end in _ENDS]
                for ending in endings:
                    kept[self._tokens.starting_with(ending)] = False
                    if not begun:
                        kept[self._tokens.starting_with(b" " + ending)] = False
        return kept if kept.any() else allowed

    def _begin_string(self) -> None:
        self._string = b'"'
        self._keep(QUOTE)

    def _read_string(self, byte: int) -> None:
        self._keep(byte)
        self._string += bytes([byte])
        top = self._open[-1] if self._open else None
        if not self._in_string and top is not None and not top.is_list and top.key is None:
            self._end_item(top)
            top.key = _text(self._string)

    def _read_between(self, byte: int) -> None:
        top = self._open[-1] if self._open else None
        if byte in (_LIST, _OBJECT):
            nodes, path = self._place()
            self._keep(byte)
            is_unique = any(node.get("uniqueItems") is True for node in nodes)
            is_followed = is_unique if byte == _LIST else self._counts_names
            seen: dict[str, bytes] | None = {} if is_followed else None
            self._open.append(_Container(byte == _LIST, nodes, seen=seen, path=path))
        elif byte in b"]}" and top is not None:
            self._end_item(top)
            self._open.pop()
            self._keep(byte)
        elif byte == COMMA and top is not None:
            self._end_item(top)
            self._keep(byte, but=top)
            top.index, top.key = top.index + 1, None
        else:
            self._keep(byte)

    def _keep(self, byte: int, but: _Container | None = None) -> None:
        for container in self._open:
            if container.seen is not None and container.key is None and container is not but:
                container.item += bytes([byte])

    def _end_item(self, container: _Container) -> None:
        text = container.item.strip(_SPACE)
        container.item = b""
        if container.seen is None or not text:
            return
        try:
            value = identity(parse_json(text))
        except HotsetError:
            return
        if value in container.seen:
            what = "items" if container.is_list else "names"
            why = "uniqueItems" if container.is_list else "a schema that counts properties"
            shown = text.decode(errors="replace")[:60]
            self.error = f"two {what} at #{container.path} are {shown}, and {why} wants each once"
        container.seen[value] = text

    def _place(self) -> tuple[list[Node], str]:
        """The schemas that may apply to the value that begins, and its path."""
        if not self._open:
            return self._in_place([self._root]), ""
        top = self._open[-1]
        if top.is_list:
            found = [one for node in top.nodes for one in _item_schemas(node, top.index)]
            return self._in_place(found), f"{top.path}/{top.index}"
        key = top.key or ""
        found = [one for node in top.nodes for one in _property_schemas(node, key)]
        return self._in_place(found), f"{top.path}/{key}"

    def _in_place(self, schemas: list[Any]) -> list[Node]:
        """These schemas, and the schemas that they apply to the same value."""
        found: dict[int, Node] = {}
        todo = list(schemas)
        while todo:
            one = todo.pop()
            if not isinstance(one, dict) or id(one) in found:
                continue
            found[id(one)] = one
            for key in ("allOf", "anyOf", "oneOf"):
                todo += one.get(key, ())
            todo += [one.get(key) for key in ("then", "else")]
            todo += one.get("dependentSchemas", {}).values()
            if isinstance(reference := one.get("$ref"), str):
                todo.append(resolve(self._root, reference))
        return list(found.values())


def _item_schemas(node: Node, index: int) -> list[Any]:
    first, rest = node.get("prefixItems", []), node.get("items")
    if isinstance(rest, list):
        first, rest = rest, node.get("additionalItems")
    found = [first[index] if index < len(first) else rest]
    return [*found, node.get("contains"), node.get("unevaluatedItems")]


def _property_schemas(node: Node, name: str) -> list[Any]:
    named = node.get("properties", {})
    found = [named[name]] if name in named else []
    for pattern, one in node.get("patternProperties", {}).items():
        try:
            matches = re.search(pattern, name) is not None
        except re.error:
            matches = True
        found += [one] if matches else []
    return found or [node.get("additionalProperties"), node.get("unevaluatedProperties")]


def _text(string: bytes) -> str:
    try:
        return str(parse_json(string))
    except HotsetError:
        return ""
