"""Which part of a tensor a rank has."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Part:
    """Some slices of a tensor along one dimension, one after another.

    Attributes:
        dim: along which.
        slices: in order; each has a start and a stop.
    """

    dim: int
    slices: tuple[slice, ...]

    @property
    def length(self) -> int:
        """What is left of the dimension."""
        return sum(each.stop - each.start for each in self.slices)

    def of(self, whole: Any) -> torch.Tensor:
        """The part of a tensor, or of one of a file, of which one slice alone is read."""
        before = (slice(None),) * self.dim
        if len(self.slices) == 1:
            part: torch.Tensor = whole[(*before, *self.slices)]
            return part
        whole = whole[...]
        return torch.cat([whole[(*before, each)] for each in self.slices], self.dim)


@dataclass(frozen=True, slots=True)
class Units:
    """Columns that ranks share out by the unit: heads, groups, or single columns.

    Where there are fewer units than ranks, several ranks have the same one.

    Attributes:
        count: how many units.
        width: columns of one.
    """

    count: int
    width: int = 1

    def share(self, rank: int, size: int) -> slice:
        """The columns that a rank has."""
        first = rank * self.count // size
        count = max(1, self.count // size)
        return slice(first * self.width, (first + count) * self.width)

    def are_shared(self, size: int) -> bool:
        """Whether ranks have as many units each, or as many ranks each one."""
        return self.count % size == 0 or size % self.count == 0


Layout = tuple[Units, ...]  # of a dimension: each of these is shared out, one after another


def length_of(layout: Layout) -> int:
    """Columns of all of them."""
    return sum(units.count * units.width for units in layout)


def share(layout: Iterable[Units], rank: int, size: int) -> tuple[slice, ...]:
    """The columns that a rank has of all of them."""
    slices, start = [], 0
    for units in layout:
        own = units.share(rank, size)
        slices.append(slice(start + own.start, start + own.stop))
        start += units.count * units.width
    return tuple(slices)
