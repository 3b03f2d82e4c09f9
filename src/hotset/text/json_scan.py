"""Where a JSON value ends, read piece by piece."""


class JsonScan:
    """Finds the end of an object or a list by its brackets and strings.

    Args:
        depth: how many brackets are open before the first character.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int | None:
        """Read on; returns the index in `text` right behind the value, None if it goes on."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "[{":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None
