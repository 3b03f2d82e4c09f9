"""JSON and TOML that others wrote: one error for all that can be wrong with it.

`json.loads` raises RecursionError on deeply nested text, which is no ValueError, and what it lets
through can exhaust the stack of code that walks it later: nesting has a limit of our own.
"""

import json
import re
import tomllib
from typing import Any

from hotset.errors import HotsetError

MOST_DEPTH = 200
# A string that does not end goes on to the end of the text: to look for another in it, from each of
# its quotes, would take hours for a few MB.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.?)*+"?|[\[{]|[\]}]', re.DOTALL)


class ForeignTextError(HotsetError, ValueError):
    """A text that cannot be read. The message is one line, to follow the name of the text."""


def parse_json(text: str | bytes | bytearray, *, check_unicode: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: bytes are UTF-8, with or without a byte order mark.
        check_unicode: refuse half a surrogate pair, which JSON can escape and UTF-8 cannot hold.

    Raises:
        ForeignTextError: it is no JSON, no UTF-8, has half a surrogate pair, or is nested more
            than `MOST_DEPTH` deep.
    """
    try:
        if not isinstance(text, str):
            text = text.decode("utf-8-sig")
        if text.count("[") + text.count("{") > MOST_DEPTH:
            _check_depth(text)
        value = json.loads(text)
        if check_unicode and ("\\ud" in text or "\\uD" in text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except ForeignTextError:
        raise
    except UnicodeEncodeError as error:
        raise ForeignTextError("is not valid Unicode: it has half a surrogate pair") from error
    except UnicodeDecodeError as error:
        raise ForeignTextError(f"is not JSON: its byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ForeignTextError(f"is not JSON from {place} on") from error
    except ValueError as error:  # more than the 4,300 that Python reads
        raise ForeignTextError(
            "is not JSON that can be read: a number has too many digits"
        ) from error
    except RecursionError as error:  # of a caller deep in the stack
        raise ForeignTextError("is nested too deeply") from error


def parse_toml(text: bytes) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ForeignTextError: it is no TOML, no UTF-8, or nested too deeply.
    """
    try:
        return tomllib.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ForeignTextError(f"is not TOML: its byte {error.start} is not UTF-8") from error
    except ValueError as error:
        raise ForeignTextError(f"is not TOML: {error}") from error
    except RecursionError as error:
        raise ForeignTextError("is nested too deeply") from error


def _check_depth(text: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        kind = text[match.start()]
        if kind in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                raise ForeignTextError(f"is nested too deeply: more than {MOST_DEPTH} levels")
        elif kind in "]}":
            depth -= 1
