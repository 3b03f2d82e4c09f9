"""Bounds of what a JSON schema lets repeat: digits, characters, items, nesting.

A model that may go on with digits often does, to the end of its token budget. A token beyond a
bound is ruled out only while others are left. As each prefix that the grammar allows can be
completed, no bound makes a schema impossible.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from hotset.grammar.follower import COMMA, DIGITS, JsonFollower, Mask, TokenTable
from hotset.option_groups import FormOptions

# 1e99 with 20 digits before it is still a finite float.
_MAX_EXPONENT_DIGITS = 2
# A token ends at most this many items or levels, rare tokens apart.
_NEAR = 8

_OPEN, _CLOSE = b"[{", b"]}"


@dataclass(frozen=True, slots=True)
class JsonBounds:
    """Upper bounds; None is no bound.

    Attributes:
        digits: of the integer part and of the fraction of a number, each; its exponent then has at
            most two.
        string: characters of a string, to the end of the token that reaches it.
        items: of an array.
        depth: arrays and objects within each other.
    """

    digits: int | None = None
    string: int | None = None
    items: int | None = None
    depth: int | None = None

    @staticmethod
    def of(forms: FormOptions) -> "JsonBounds":
        """The bounds that an engine is configured with."""
        return JsonBounds(
            digits=forms.json_max_digits or None,
            string=forms.json_max_string,
            items=forms.json_max_items,
            depth=forms.json_max_depth,
        )

    def widened(self, schema: object) -> "JsonBounds":
        """The same bounds, raised to the lengths and constants that `schema` names."""
        strings, items = [0], [0]
        todo = [(schema, False)]
        while todo:
            one, is_value = todo.pop()
            if isinstance(one, dict):
                strings += map(_size, (one.get("minLength"), one.get("maxLength")))
                items += map(_size, (one.get("minItems"), one.get("maxItems")))
                strings += map(len, one)
                todo += [(some, is_value or key in ("const", "enum")) for key, some in one.items()]
            elif isinstance(one, list):
                items.append(len(one))
                todo += [(some, is_value) for some in one]
            elif isinstance(one, str) and is_value:
                strings.append(len(one))
        return replace(
            self,
            string=None if self.string is None else max(self.string, *strings),
            items=None if self.items is None else max(self.items, *items),
        )


class JsonPosition(JsonFollower):
    """Where in its JSON an output is, as far as bounds need to know.

    It never has an error: a bound gives way rather than fail.

    Args:
        bounds: what to keep to.
        tokens: of the vocabulary.
    """

    def __init__(self, bounds: JsonBounds, tokens: TokenTable) -> None:
        super().__init__(tokens)
        self._bounds = bounds
        self._num_chars = 0  # of the string so far
        self._num_digits = 0  # of the part of a number so far
        self._in_number = False
        self._in_exponent = False
        self._items: list[int | None] = []  # commas so far of open arrays; None for objects
        self._is_beyond = False

    def copy(self) -> Self:
        """Another follower, at the same place of the output."""
        other = super().copy()
        other._items = self._items.copy()
        return other

    @property
    def is_near(self) -> bool:
        """Whether the next token may be beyond a bound."""
        bounds = self._bounds
        return (
            (self._in_number and bounds.digits is not None)
            or (self._in_string and bounds.string is not None and self._num_chars >= bounds.string)
            or self._is_near_structure()
        )

    def keep_within(self, allowed: Mask) -> Mask:
        """The tokens of `allowed`, `[V]`, that keep to the bounds; all of them if none does."""
        kept = allowed
        bounds, tokens = self._bounds, self._tokens
        if self._in_number and bounds.digits is not None:
            most = min(bounds.digits, _MAX_EXPONENT_DIGITS) if self._in_exponent else bounds.digits
            kept = kept & (tokens.leading_digits <= max(0, most - self._num_digits))
        if self._in_string and bounds.string is not None and not self._escaped:
            ending = kept & tokens.ends_string
            if self._num_chars >= bounds.string and ending.any():
                kept = ending
        if self._is_near_structure():
            kept = kept.copy()
            for token_id in np.flatnonzero(kept & tokens.structural).tolist():
                ahead = self.copy()
                ahead._is_beyond = False
                ahead.advance(token_id)
                kept[token_id] = not ahead._is_beyond
        return kept if kept.any() else allowed

    def _is_near_structure(self) -> bool:
        items, depth = self._bounds.items, self._bounds.depth
        return (depth is not None and len(self._items) + _NEAR > depth) or (
            items is not None
            and any(count is not None and count + _NEAR > items for count in self._items)
        )

    def _begin_string(self) -> None:
        self._end_number()
        self._num_chars = 0

    def _read_string(self, byte: int) -> None:
        self._num_chars += byte & 0xC0 != 0x80  # not the inside of a character

    def _read_between(self, byte: int) -> None:
        if byte in DIGITS:
            self._in_number = True
            self._num_digits += 1
        elif self._in_number and byte in b".eE+-":
            self._num_digits = 0
            self._in_exponent = byte in b"eE+-"
        else:
            self._end_number()
            self._read_structure(byte)

    def _end_number(self) -> None:
        self._num_digits = 0
        self._in_number = self._in_exponent = False

    def _read_structure(self, byte: int) -> None:
        if byte in _OPEN:
            self._items.append(0 if byte == _OPEN[0] else None)
            depth = self._bounds.depth
            self._is_beyond |= depth is not None and len(self._items) > depth
        elif byte in _CLOSE:
            if self._items:
                self._items.pop()
        elif byte == COMMA and self._items and (count := self._items[-1]) is not None:
            self._items[-1] = count + 1
            items = self._bounds.items
            self._is_beyond |= items is not None and count + 1 >= items


def _size(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) else 0
