"""Options declared once: a field has its help, unit, choices and range; checks and flags follow.

Imports no torch.
"""

import functools
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hotset.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Range:
    """Which numbers an option takes.

    Attributes:
        expected: the end of the message that refuses others.
    """

    expected: str
    accepts: Callable[[Any], bool]


def option(
    default: Any,
    help_: str,
    *,
    details: str = "",
    unit: str = "",
    within: Range | None = None,
    if_none: str = "",
    flags: tuple[str, ...] | None = None,
) -> Any:
    """A field of a dataclass of options; its type has the choices.

    Args:
        default: what holds where nothing is given.
        help_: what it is, in the words of `--help`.
        details: what the page of options says beyond that.
        unit: of a number, in the plural.
        within: the numbers it takes; None is all of its type.
        if_none: what holds where it is None.
        flags: on the command line; None is that of the field's name, and () none at all.
    """
    return field(
        default=default, metadata={"option": (help_, details, unit, within, if_none, flags)}
    )


@dataclass(frozen=True, slots=True)
class Option:
    """A declared option: what `option` was told, with the field's name and type."""

    name: str
    kind: Any
    is_optional: bool
    default: Any
    help: str
    details: str
    unit: str
    within: Range | None
    if_none: str
    given_flags: tuple[str, ...] | None

    @property
    def flags(self) -> tuple[str, ...]:
        """Its spellings on the command line; a switch that is on by default has one for off."""
        if self.given_flags is not None:
            return self.given_flags
        dashed = self.name.replace("_", "-")
        return (f"--{dashed}/--no-{dashed}",) if self.default is True else (f"--{dashed}",)

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts it takes; none where it takes any value of its type."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def taken(self, value: Any) -> Any:
        """A value as the field holds it: a text becomes a path, a number one of Python's.

        Raises:
            ConfigError: it is of another type, no choice, or out of range.
        """
        if value is None and self.is_optional:
            return None
        taken, expected = _taken_as(value, self.kind)
        if taken is None:
            expected += " or None" if self.is_optional else ""
        elif self.within is not None and not self.within.accepts(taken):
            taken, expected = None, self.within.expected
        if taken is None:
            raise ConfigError(f"{self.name} is {value!r}; expected {expected}")
        return taken


@functools.cache
def options_of(kind: type) -> dict[str, Option]:
    """By name, in their order, the options of a dataclass whose fields are all made by `option`."""
    hints, found = get_type_hints(kind), {}
    for each in fields(kind):
        hint = hints[each.name]
        members = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
        (member,) = (member for member in members if member is not NoneType)
        is_optional = NoneType in members
        said = each.metadata["option"]
        found[each.name] = Option(each.name, member, is_optional, each.default, *said)
    return found


def _taken_as(value: Any, kind: Any) -> tuple[Any, str]:
    """A value as what its field holds, None where it cannot be that; and what is expected.

    Numbers of other libraries become Python's; True and False are no numbers.
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
