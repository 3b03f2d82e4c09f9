"""Batches of copies between device blocks and host slots. Imports no torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hotset.memory.copy_runs import Run

T = TypeVar("T")


class HostMemory(Protocol):
    """Memory in slots, such as `arena.HostArena`."""

    slot_bytes: int

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot."""
        ...

    def address(self, slot: int) -> int:
        """Where a slot starts."""
        ...


class DeviceMemory(Protocol):
    """Memory in blocks of one size, such as `device_payloads.DevicePayloads`."""

    block_bytes: int

    def runs(self, block: int) -> Iterable[tuple[int, int, int]]:
        """The `(address, place in its payload, bytes)` of a block."""
        ...


class Copier(Protocol):
    """Copies runs of bytes between the device and host memory, beside the model's steps."""

    @property
    def num_ready_slots(self) -> int:
        """How many leading host slots can be used; may grow."""
        ...

    def mark(self) -> None:
        """Note the compute submitted so far, for `submit`."""
        ...

    def submit(self, runs: Sequence[Run], *, to_host: bool) -> int:
        """Start copying all `runs` one way, as one batch; returns an id.

        The copies wait for the compute that was submitted before the last `mark`.
        """
        ...

    def order(self, copy_id: int) -> bool:
        """Have compute submitted from here on wait for a copy on the device; False if none can."""
        ...

    def poll(self) -> list[tuple[int, float]]:
        """Ids that ended since the last call, with the seconds each took."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until something can be polled, or `timeout_s` has passed."""
        ...

    def close(self) -> None:
        """Finish what was submitted and release the resources."""
        ...


@dataclass(frozen=True, slots=True)
class Move(Generic[T]):
    """One block to be copied to or from a host slot, and whose it is."""

    owner: T
    block: int
    slot: int


@dataclass(eq=False, slots=True)
class Batch(Generic[T]):
    """Moves that were submitted together, all in one direction.

    Attributes:
        num_bytes: of all moves.
        is_brief: whether it is to end before the step that it was submitted beside.
        has_arrived: whether its fetches were reported.
    """

    moves: list[Move[T]]
    num_bytes: int
    to_host: bool
    is_brief: bool
    has_arrived: bool = False


class Mover(Generic[T]):
    """Queues moves, submits them in batches, and says when a batch has ended.

    It knows blocks and slots by their addresses only, and owners not at all.

    Args:
        copier: does the copies.
        block_runs: the `(address, place in its slot, bytes)` that make up a block.
        slot_address: of a host slot.

    Attributes:
        copier: as given.
    """

    def __init__(
        self,
        copier: Copier,
        *,
        block_runs: Callable[[int], Iterable[tuple[int, int, int]]],
        slot_address: Callable[[int], int],
    ) -> None:
        self.copier = copier
        self._block_runs = block_runs
        self._slot_address = slot_address
        self._down: list[Move[T]] = []
        self._up: list[Move[T]] = []
        self._batches: dict[int, Batch[T]] = {}

    @property
    def is_copying(self) -> bool:
        """Whether a batch is under way."""
        return bool(self._batches)

    @property
    def is_busy(self) -> bool:
        """Whether moves are queued or under way."""
        return bool(self._down or self._up or self._batches)

    def queue(self, owner: T, block: int, slot: int, *, to_host: bool) -> None:
        """Copy with the next `flush` that has room for it."""
        (self._down if to_host else self._up).append(Move(owner, block, slot))

    def flush(self, *, most_up: int | None = None) -> None:
        """Submit all moves down, and those up: the first `most_up`, as a brief batch, or all."""
        self._submit(self._down, len(self._down), to_host=True, is_brief=False)
        num_up = len(self._up) if most_up is None else min(most_up, len(self._up))
        self._submit(self._up, num_up, to_host=False, is_brief=most_up is not None)

    def poll(self) -> list[tuple[Batch[T], float]]:
        """Batches that ended since the last call, with the seconds each took."""
        return [(self._batches.pop(copy_id), s) for copy_id, s in self.copier.poll()]

    def order(self) -> list[Batch[T]]:
        """Have compute wait for the brief batches up; returns those for which it does so now."""
        return [
            batch
            for copy_id, batch in self._batches.items()
            if batch.is_brief and not batch.has_arrived and self.copier.order(copy_id)
        ]

    def time_copies(self, num_blocks: int, *, to_host: bool) -> float:
        """Copy the first blocks to or from the first slots, and wait for it; returns the seconds.

        Only where nothing else is under way.
        """
        moves = [Move(None, number, number) for number in range(num_blocks)]
        self.copier.submit(self._runs(moves), to_host=to_host)
        while not (ended := self.copier.poll()):
            self.copier.wait(1.0)
        return ended[0][1]

    def moving_down(self) -> list[T]:
        """Owners of the moves to host memory that have not ended."""
        batches = (batch.moves for batch in self._batches.values() if batch.to_host)
        return [move.owner for moves in (self._down, *batches) for move in moves]

    def _submit(self, queued: list[Move[T]], count: int, *, to_host: bool, is_brief: bool) -> None:
        if not count:
            return
        moves = queued[:count]
        del queued[:count]
        runs = self._runs(moves)
        copy_id = self.copier.submit(runs, to_host=to_host)
        num_bytes = sum(run.num_bytes for run in runs)
        self._batches[copy_id] = Batch(moves, num_bytes, to_host, is_brief)

    def _runs(self, moves: Sequence[Move[T] | Move[None]]) -> list[Run]:
        runs = []
        for move in moves:
            host = self._slot_address(move.slot)
            for device, place, num_bytes in self._block_runs(move.block):
                runs.append(Run(device, host + place, num_bytes))
        return runs
