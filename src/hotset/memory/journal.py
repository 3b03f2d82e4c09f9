"""What is found in which tier, as changes in order, for routers of requests. Imports no torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

KEY_BYTES = 16
ROW_BYTES = KEY_BYTES + 1
TIERS = ("device", "host", "disk", "remote")  # a row has a number instead
_MOST_CHANGES = 2**16  # that wait to be taken
_MOST_CONTENT = 2**13  # rows of a part, so that a step is not held up

OnChange = Callable[[bytes, bool], None]
"""Takes a key, and whether its content is found from now on."""

_CODES = [(bytes([2 * number]), bytes([2 * number + 1])) for number in range(len(TIERS))]


@dataclass(frozen=True, slots=True)
class JournalPart:
    """A part of an engine's journal. A row is 16 bytes of key, and `2 * tier + is_there`.

    A snapshot is one or more parts with content, and changes between them. A follower knows all
    once the last of them has come: a key is where the last row with it says.

    Attributes:
        first: number of the first change. Changes of all parts are numbered in one sequence: a
            number that is left out says that changes were lost.
        changes: rows, the oldest first.
        content: rows of a snapshot, to be taken after `changes`; None: no part of one.
        begins: whether a snapshot begins with `content`.
        ends: whether it ends with it.
    """

    first: int
    changes: bytes = b""
    content: bytes | None = None
    begins: bool = False
    ends: bool = False

    @property
    def next(self) -> int:
        """Number of the first change of the next part."""
        return self.first + len(self.changes) // ROW_BYTES


def rows_of(rows: bytes) -> Iterator[tuple[bytes, int, bool]]:
    """The key, the tier's number, and whether it is there, of each row.

    Raises:
        ValueError: not whole rows, or a tier that there is not.
    """
    if len(rows) % ROW_BYTES:
        raise ValueError(f"a journal has {len(rows)} bytes; expected rows of {ROW_BYTES}")
    if rows and max(rows[KEY_BYTES::ROW_BYTES]) >= 2 * len(TIERS):
        raise ValueError(f"a journal names a tier beyond the {len(TIERS)} there are")
    for start in range(0, len(rows), ROW_BYTES):
        code = rows[start + KEY_BYTES]
        yield rows[start : start + KEY_BYTES], code >> 1, bool(code & 1)


class Source(Protocol):
    """A tier as a journal sees it.

    Attributes:
        on_change: to be called with each change; None: nothing is to be told.
    """

    on_change: OnChange | None

    def all_keys(self) -> list[bytes]:
        """Keys of all content that is found here."""
        ...

    def has(self, key: bytes) -> bool:
        """Whether the content of a key is found here now."""
        ...


class Journal:
    """Notes what is found in the tiers of an engine and what is gone, while it is followed.

    Used by the engine's thread alone. What is not taken in time is dropped, which the next part's
    number says. Until it is followed nothing is noted.

    Args:
        lanes: of each lane of the engine the tiers by name; names that `TIERS` has not are left
            out. What a tier of several lanes has is told once.
    """

    def __init__(self, *lanes: Mapping[str, Source]) -> None:
        self._sources = [
            (number, sources[name])
            for number, name in enumerate(TIERS)
            for sources in lanes
            if name in sources
        ]
        self._rows: list[bytes] = []
        self._first = 0
        self._is_asked = False  # for a snapshot
        # What the rest of a snapshot is to name; None: none is being made.
        self._left: list[tuple[int, Source, list[bytes]]] | None = None

    @property
    def has_news(self) -> bool:
        """Whether `take` would return a part."""
        return bool(self._rows) or self._is_asked or self._left is not None

    def follow(self, is_on: bool) -> None:
        """Note changes from now on, and make a snapshot; or note nothing more.

        Where a snapshot is being made already, another one comes after it.
        """
        self._is_asked = is_on
        for number, source in self._sources:
            others = [one for same, one in self._sources if same == number and one is not source]
            source.on_change = partial(self._note, number, others) if is_on else None
        if not is_on:
            self._drop()
            self._left = None

    def take(self) -> JournalPart | None:
        """What has changed since the last call, with some of a snapshot; None where nothing has."""
        if not self.has_news:
            return None
        rows, self._rows = self._rows, []
        first, self._first = self._first, self._first + len(rows)
        changes = b"".join(rows)
        begins = self._left is None and self._is_asked
        if begins:
            self._is_asked = False
            self._left = [(number, source, source.all_keys()) for number, source in self._sources]
        if self._left is None:
            return JournalPart(first, changes)
        content = self._content(self._left)
        ends = not self._left
        if ends:
            self._left = None
        return JournalPart(first, changes, content, begins, ends)

    def _note(self, number: int, others: list[Source], key: bytes, is_there: bool) -> None:
        if any(other.has(key) for other in others):
            return
        if len(self._rows) == _MOST_CHANGES:
            self._drop()
        self._rows.append(key + _CODES[number][is_there])

    def _drop(self) -> None:
        self._first += len(self._rows)
        self._rows.clear()

    def _content(self, left: list[tuple[int, Source, list[bytes]]]) -> bytes:
        """Rows of the next keys that are still there. What came meanwhile, changes have told."""
        num_left, rows = _MOST_CONTENT, []
        while left and num_left:
            number, source, keys = left[-1]
            some = keys[-num_left:]
            del keys[-num_left:]
            num_left -= len(some)
            rows += [key + _CODES[number][True] for key in some if source.has(key)]
            if not keys:
                left.pop()
        return b"".join(rows)
