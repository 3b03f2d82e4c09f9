"""How an option is declared: once, as the field of a frozen dataclass.

Imports no torch.
"""

import functools
import math
import numbers
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hotset.errors import ConfigError


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


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as its field declares it; see `option`.

    Attributes:
        kind: `int`, `float`, `bool`, `str`, `Path`, or `Literal` for choices.
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
    short: str
    has_flag: bool
    keeps_answers: bool

    @property
    def flags(self) -> tuple[str, ...]:
        """Its names on the command line; none where that does not have it."""
        if not self.has_flag:
            return ()
        words = self.name.replace("_", "-")
        name = f"--{words}/--no-{words}" if self.kind is bool and self.default else f"--{words}"
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
    short: str = "",
    has_flag: bool = True,
    keeps_answers: bool = False,
) -> Any:
    """Declare the option that a field is; its name, type and choices are the field's.

    Args:
        default: what it is where nobody gives it.
        help: of the flag, with the unit unless the name ends with it.
        choices: what a field of type `str` may be, where the type does not say it.
        bounds: numbers that it takes.
        otherwise: what a default of None comes to.
        more: what docs/options.md says besides.
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
        "short": short,
        "has_flag": has_flag,
        "keeps_answers": keeps_answers,
    }
    return field(default=default, metadata=told)


def options_of(group: type) -> tuple[Option, ...]:
    """The options that a group declares or has from its base."""
    return _options_of(group)  # cached; mypy takes some classes for unhashable there


@functools.cache
def _options_of(group: type) -> tuple[Option, ...]:
    found, hints = [], get_type_hints(group)
    for one in fields(group):
        hint = hints[one.name]
        members = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
        (kind,) = (member for member in members if member is not NoneType)
        told = dict(one.metadata)
        if choices := told.pop("choices"):
            kind = Literal[choices]
        found.append(Option(one.name, kind, NoneType in members, one.default, **told))
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
    """A value as what its field holds, None where it cannot be that; and what is expected.

    True and False are no numbers.
    """
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        taken = value if isinstance(value, str) and value in choices else None
        return taken, f"{', '.join(choices[:-1])} or {choices[-1]}"
    if kind is bool:
        return value if isinstance(value, bool) else None, "True or False"
    if kind is Path:
        return Path(value) if isinstance(value, str | os.PathLike) else None, "a path"
    if kind is str:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None, "a text"
    is_number = not isinstance(value, bool)
    if kind is int:
        is_number = is_number and isinstance(value, numbers.Integral)
        return int(value) if is_number else None, "a whole number"
    assert kind is float
    is_number = is_number and isinstance(value, numbers.Real)
    return (value if isinstance(value, int) else float(value)) if is_number else None, "a number"
