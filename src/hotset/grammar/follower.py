"""What follows an output's JSON byte by byte, and rules out tokens that no grammar can."""

import copy
import functools
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

QUOTE, ESCAPE, COMMA = b'"\\,'
DIGITS = b"0123456789"


class TokenTable:
    """The bytes of all tokens, and which of them matter to followers. V = vocabulary.

    Args:
        of: the bytes of each token id, empty for special ones.
    """

    def __init__(self, of: Sequence[bytes]) -> None:
        self.of = of
        self.leading_digits = np.array(
            [len(one) - len(one.lstrip(DIGITS)) for one in of], np.uint16
        )  # [V]
        self.ends_string = np.array([one[:1] == b'"' for one in of])  # [V]
        self.structural = np.array([any(byte in b",[{" for byte in one) for one in of])  # [V]

    def starting_with(self, start: bytes) -> list[int]:
        """The ids of tokens that begin with `start`, which is not empty."""
        end = start[:-1] + bytes([start[-1] + 1])  # no byte of UTF-8 is 255
        texts, ids = self.in_order
        return ids[bisect_left(texts, start) : bisect_left(texts, end)]

    @functools.cached_property
    def in_order(self) -> tuple[list[bytes], list[int]]:
        """All tokens sorted by their bytes, and their ids. Takes a while the first time."""
        ids = sorted(range(len(self.of)), key=self.of.__getitem__)
        return [self.of[i] for i in ids], ids


class JsonFollower(ABC):
    """Follows one output of JSON, and tells strings from what is between them.

    Attributes:
        error: one line once the output cannot be right any more.

    Args:
        tokens: of the vocabulary.
    """

    def __init__(self, tokens: TokenTable) -> None:
        self.error: str | None = None
        self._tokens = tokens
        self._in_string = False
        self._escaped = False

    def copy(self) -> Self:
        """Another follower, at the same place of the output."""
        return copy.copy(self)

    def advance(self, token_id: int) -> None:
        """Take in the next token; may set `error`."""
        for byte in self._tokens.of[token_id]:
            if not self._in_string:
                if byte == QUOTE:
                    self._in_string = True
                    self._begin_string()
                else:
                    self._read_between(byte)
            elif self._escaped:
                self._escaped = False
                self._read_string(byte)
            else:
                self._escaped = byte == ESCAPE
                self._in_string = byte != QUOTE
                self._read_string(byte)

    @property
    @abstractmethod
    def is_near(self) -> bool:
        """Whether a next token may have to be ruled out; else `keep_within` need not be called."""

    @abstractmethod
    def keep_within(self, allowed: Mask) -> Mask:
        """The tokens of `allowed`, `[V]`, that may come next; all of them if none is left."""

    @abstractmethod
    def _begin_string(self) -> None:
        """A quote begins a string."""

    @abstractmethod
    def _read_string(self, byte: int) -> None:
        """A byte of a string, with the quote that ends it: `_in_string` is False at that one."""

    @abstractmethod
    def _read_between(self, byte: int) -> None:
        """A byte that belongs to no string."""
