"""Values as fields hold them: numbers of other libraries become Python's, other types fail.

Each function returns the value, or raises TypeError. True and False are no numbers.
"""

import numbers
from collections.abc import Mapping
from typing import Any


def whole_number(value: object) -> int:
    """A whole number of Python or another library. Raises TypeError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError
    return int(value)


def number(value: object) -> float:
    """A number likewise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def flag(value: object) -> bool:
    """True or False itself."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def texts(value: object) -> tuple[str, ...]:
    """A list or tuple of texts."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise TypeError
    return tuple(value)


def whole_numbers(value: object) -> tuple[int, ...]:
    """A list or tuple of whole numbers."""
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(map(whole_number, value))


def numbers_by_id(value: object) -> dict[int, float]:
    """A mapping from whole numbers to numbers."""
    if not isinstance(value, Mapping):
        raise TypeError
    return {whole_number(token_id): number(bias) for token_id, bias in value.items()}


def json_object(value: object) -> dict[str, Any]:
    """A dict."""
    if not isinstance(value, dict):
        raise TypeError
    return value
