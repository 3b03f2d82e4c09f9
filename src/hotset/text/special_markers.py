"""Puts markers that are special tokens back into an output's text, which leaves them out."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence


class MarkedText:
    """The text of one output with its markers in it, as it grows.

    Args:
        markers: token id -> text.
        decode: the text of token ids, special ones too or not, by its second argument.
    """

    def __init__(
        self, markers: Mapping[int, str], decode: Callable[[Sequence[int], bool], str]
    ) -> None:
        self._markers = markers
        self._decode = decode
        self._token_ids: list[int] = []
        self._num_chars = 0  # of the text without markers, so far
        self._waiting: deque[tuple[int, str]] = deque()  # where each belongs in that text

    def feed(self, text: str, token_ids: Sequence[int]) -> str:
        """The new text, with the markers whose place is within it or right behind it."""
        if not self._markers:
            return text
        for token_id in token_ids:
            if token_id in self._markers:
                at = len(self._decode(self._token_ids, False))
                self._waiting.append((at, self._markers[token_id]))
            self._token_ids.append(token_id)
        parts, start = [], self._num_chars
        self._num_chars += len(text)
        begin = 0
        while self._waiting and self._waiting[0][0] <= self._num_chars:
            at, marker = self._waiting.popleft()
            at = max(begin, at - start)
            parts += [text[begin:at], marker]
            begin = at
        return "".join([*parts, text[begin:]])

    def end(self) -> str:
        """Markers behind the last character."""
        markers = "".join(marker for _, marker in self._waiting)
        self._waiting.clear()
        return markers
