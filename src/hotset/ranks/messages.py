"""What ranks are told at start, and what they report. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from hotset.layout import Layout
from hotset.metrics import ExpertCounts, RankMemory

# How long ranks may take to start, load and compile; no rank waits for a collective meanwhile.
START_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to a rank: its number, and where it finds the others.

    Attributes:
        path: for its imports.
        device: `cpu` or `cuda`.
        port: of the place where ranks find each other, on this host; 0 where torchrun has one.
        attempt: what keys in torchrun's begin with: it has those of earlier starts too.
        timeout_s: how long it waits for them.
    """

    path: tuple[str, ...]
    rank: int
    layout: Layout
    device: str
    port: int
    attempt: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Call:
    """A function that all ranks call at the same time, found by its name.

    Attributes:
        is_build: whether it is given the loaded model first and makes a `Rank`, which then replays
            commands until `Op.END`; otherwise it returns the loaded model.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    is_build: bool


class Done(NamedTuple):
    """A `Call` has returned, or the replay has ended.

    Attributes:
        facts: that have to be equal on all ranks, by name.
    """

    facts: dict[str, str]


class Stepped(NamedTuple):
    """Steps that were launched, since the last build."""

    num_steps: int


class Copied(NamedTuple):
    """Copies that ended, with the seconds each took, and how many host slots are ready."""

    ended: list[tuple[int, float]]
    num_ready_slots: int


class Held(NamedTuple):
    """What the rank has of the memory, after it was built and with each `Counted`."""

    memory: RankMemory


class Counted(NamedTuple):
    """What experts did up to a `COUNT` of this number."""

    number: int
    counts: ExpertCounts | None


class Moved(NamedTuple):
    """A `WRITE` or `READ` has ended.

    Attributes:
        checksum: of what was written or read.
        fault: what went wrong; empty for nothing.
    """

    number: int
    checksum: int
    fault: str


class Failed(NamedTuple):
    """The rank can do no more, and this line says why."""

    line: str

    @classmethod
    def of(cls, error: BaseException) -> "Failed":
        """Of what it raised."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split()))


RankReport = Done | Stepped | Copied | Held | Counted | Moved | Failed
