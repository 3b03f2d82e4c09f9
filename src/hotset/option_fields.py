"""How an option is declared: once, as the field of a frozen dataclass.

Imports no torch.
"""

import functools
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hotset.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Numbers that an option takes: from `least`, or above it, to `most`."""

    expected: str
    least: float
    most: float = math.inf
    is_open: bool = False

    def hold(self, value: Any) -> bool:
        """Whether a number is among them; no NaN is."""
        is_enough = self.least < value if self.is_open else self.least <= value
        return bool(is_enough and value <= self.most)


COUNT = Bounds("1 or more", 1)
SIZE = Bounds("a size above 0 GiB", 0, sys.float_info.max, is_open=True)


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as its field declares it; see `option`.

    Attributes:
        kind: `Literal` for choices; otherwise a type of `_KINDS`, or a class.
        is_optional: whether it may be None.
    """

    name: str
    kind: Any
    is_optional: bool
    default: Any
    help: str
    bounds: Bounds | None
    otherwise: str
    more: str
    flag: str
    metavar: str
    short: str
    has_flag: bool
    keeps_answers: bool

    @property
    def flags(self) -> tuple[str, ...]:
        """Its names on the command line; none where that does not have it."""
        if not self.has_flag:
            return ()
        name = self.flag or f"--{self.name.replace('_', '-')}"
        if self.kind is bool and self.default:
            name = f"{name}/--no-{name[2:]}"
        return (name, self.short) if self.short else (name,)

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be; empty where that is no list."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def check(self, value: Any) -> Any:
        """The value as what the field holds: numbers of other libraries become Python's.

        Raises:
            ConfigError: it is of another type, out of bounds, or none of the choices.
        """
        if value is None and self.is_optional:
            return None
        taken, expected = _taken_as(value, self.kind)
        if taken is None:
            expected += " or None" if self.is_optional else ""
            raise ConfigError(f"{self.name} is {value!r}; expected {expected}")
        if self.bounds is not None and not self.bounds.hold(taken):
            raise ConfigError(f"{self.name} is {value!r}; expected {self.bounds.expected}")
        return taken


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    bounds: Bounds | None = None,
    otherwise: str = "",
    more: str = "",
    flag: str = "",
    metavar: str = "",
    short: str = "",
    has_flag: bool = True,
    keeps_answers: bool = False,
) -> Any:
    """Declare the option that a field is; its name, type and choices are the field's.

    Args:
        default: what it is where it is not given; `dict` for an empty one.
        help: of the flag, with the unit unless the name ends with it.
        choices: what a field of type `str` may be, where the type does not say it.
        bounds: numbers that it takes.
        otherwise: what a default of None comes to.
        more: what docs/options.md says besides.
        flag: its name on the command line, where that is another.
        metavar: what the command line's help calls its value.
        short: a flag of one letter.
        has_flag: whether the command line has it.
        keeps_answers: whether it changes no answer, but for rounding.
    """
    told = {
        "help": help,
        "choices": choices,
        "bounds": bounds,
        "otherwise": otherwise,
        "more": more,
        "flag": flag,
        "metavar": metavar,
        "short": short,
        "has_flag": has_flag,
        "keeps_answers": keeps_answers,
    }
    if default is dict:
        return field(default_factory=dict, metadata=told)
    return field(default=default, metadata=told)


def options_of(group: type) -> tuple[Option, ...]:
    """The options that a group declares or has from its base."""
    return _options_of(group)  # cached; mypy takes some classes for unhashable there


@functools.cache
def _options_of(group: type) -> tuple[Option, ...]:
    found, hints = [], get_type_hints(group)
    for one in fields(group):
        hint = hints[one.name]
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        (kind,) = (member for member in members if member is not NoneType)
        told = dict(one.metadata)
        if choices := told.pop("choices"):
            kind = Literal[choices]
        default = one.default if one.default_factory is MISSING else one.default_factory()
        found.append(Option(one.name, kind, NoneType in members, default, **told))
    return tuple(found)


class Group:
    """Options of one concern, checked as they are made."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for one in options_of(type(self)):
            value = getattr(self, one.name)
            taken = one.check(value)
            if taken is not value:
                object.__setattr__(self, one.name, taken)


def _taken_as(value: Any, kind: Any) -> tuple[Any, str]:
    """A value as what its field holds, None where it cannot be that; and what is expected."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        taken = value if isinstance(value, str) and value in choices else None
        return taken, f"{', '.join(choices[:-1])} or {choices[-1]}"
    if kind not in _KINDS:
        return value if isinstance(value, kind) else None, f"a {kind.__name__}"
    take, expected = _KINDS[kind]
    try:
        return take(value), expected
    except (TypeError, OverflowError):
        return None, expected


# True and False are no numbers; numbers of other libraries become Python's.
def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _tuple_of(take: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    def taken(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(map(take, value))

    return taken


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _text_or_path(value: Any) -> str:
    return _text(os.fspath(value))


def _texts(value: Any) -> tuple[str, ...]:
    """A text may stand alone."""
    return (value,) if isinstance(value, str) else _tuple_of(_text)(value)


def _numbers_by_id(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {_whole_number(token_id): _number(bias) for token_id, bias in value.items()}


def _json_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value


# Type of a field -> what takes a value or raises TypeError, and what is expected.
_KINDS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_flag, "True or False"),
    int: (_whole_number, "a whole number"),
    float: (_number, "a number"),
    str: (_text_or_path, "a text"),
    Path: (Path, "a path"),
    tuple[str, ...]: (_texts, "a text or a list of texts"),
    tuple[int, ...]: (_tuple_of(_whole_number), "a list of token ids"),
    Mapping[int, float]: (_numbers_by_id, "numbers by token id"),
    dict[str, Any]: (_json_object, "a JSON schema as a dict"),
}
