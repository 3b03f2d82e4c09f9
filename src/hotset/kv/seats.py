"""Seats of hot requests: what serves as their slots, and where their tokens are. Imports no torch.

A hot request has most of its tokens in host memory alone, and some in *slots* on the device. Which
tokens those are is decided there, by what a step selects; here is what the device is told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

DeviceBlock = NewType("DeviceBlock", int)
HostSlot = NewType("HostSlot", int)
SeatNumber = NewType("SeatNumber", int)


class SlotBlock(NamedTuple):
    """A device block that serves as slots.

    Attributes:
        start: the position of the token in its first slot, the others follow; None where its
            slots hold no token.
    """

    block: DeviceBlock
    start: int | None


@dataclass(slots=True)
class Seat:
    """A row in the device's tables, of one hot request.

    Attributes:
        slot_blocks: those of its slots.
        host: index of a block of the request -> the host slot that has a copy of it.
    """

    number: SeatNumber
    slot_blocks: list[DeviceBlock]
    host: dict[int, HostSlot] = field(default_factory=dict)


class SeatReset(NamedTuple):
    """A seat that begins, with nothing in host memory yet."""

    seat: SeatNumber
    slot_blocks: Sequence[SlotBlock]


class HostPlace(NamedTuple):
    """A copy in host memory that can be read from now on: of one block of a seat's request."""

    seat: SeatNumber
    block_index: int
    slot: HostSlot


@dataclass(frozen=True, slots=True)
class SeatUpdates:
    """What the device's tables lack, to be written before a step: `resets`, then `places`."""

    resets: list[SeatReset] = field(default_factory=list)
    places: list[HostPlace] = field(default_factory=list)


class Seats:
    """Who sits where. A seat is free, or of one hot request.

    Args:
        num_seats: rows of the device's tables.
        num_slots: of a seat, a multiple of `block_size`.
        block_size: tokens of a block.
    """

    def __init__(self, *, num_seats: int, num_slots: int, block_size: int) -> None:
        assert num_slots > 0 and num_slots % block_size == 0
        self.num_seats = num_seats
        self.blocks_per_seat = num_slots // block_size
        self._free = [SeatNumber(number) for number in range(num_seats - 1, -1, -1)]
        self._taken: dict[SeatNumber, Seat] = {}
        self._resets: dict[SeatNumber, SeatReset] = {}
        self._places: dict[tuple[SeatNumber, int], HostPlace] = {}

    @property
    def num_free(self) -> int:
        """Seats that can be taken."""
        return len(self._free)

    @property
    def num_taken(self) -> int:
        """Seats of hot requests."""
        return len(self._taken)

    def take(self, slot_blocks: Sequence[SlotBlock]) -> Seat:
        """Give a request a seat with these slots; the first block's are used up first."""
        assert len(slot_blocks) == self.blocks_per_seat
        seat = Seat(self._free.pop(), [part.block for part in slot_blocks])
        self._taken[seat.number] = seat
        self._resets[seat.number] = SeatReset(seat.number, slot_blocks)
        return seat

    def place(self, seat: Seat, index: int, slot: HostSlot) -> None:
        """Host memory has a whole copy of block `index`, which stays there while the seat does."""
        assert self._taken[seat.number] is seat
        seat.host[index] = slot
        self._places[seat.number, index] = HostPlace(seat.number, index, slot)

    def leave(self, seat: Seat) -> list[DeviceBlock]:
        """Free a seat. Returns its slots' blocks, whose content is of no use."""
        del self._taken[seat.number]
        self._free.append(seat.number)
        self._withdraw(seat)
        return seat.slot_blocks

    def forget_slots(self) -> None:
        """No slot of any seat can be relied on: a step did not run to its end."""
        for seat in self._taken.values():
            empty = [SlotBlock(block, None) for block in seat.slot_blocks]
            self._resets[seat.number] = SeatReset(seat.number, empty)
            for index, slot in seat.host.items():
                self.place(seat, index, slot)

    def take_updates(self) -> SeatUpdates:
        """What changed since the last call."""
        updates = SeatUpdates(list(self._resets.values()), list(self._places.values()))
        self._resets, self._places = {}, {}
        return updates

    def _withdraw(self, seat: Seat) -> None:
        """Nobody need be told of a seat that is free."""
        self._resets.pop(seat.number, None)
        for index in seat.host:
            self._places.pop((seat.number, index), None)

    def check(self) -> None:
        """Assert that each seat is in one state and no device block serves twice."""
        assert sorted([*self._free, *self._taken]) == list(range(self.num_seats))
        blocks = [block for seat in self._taken.values() for block in seat.slot_blocks]
        assert len(set(blocks)) == len(blocks), "a block serves as slots twice"
        slots = [slot for seat in self._taken.values() for slot in set(seat.host.values())]
        assert len(slots) == sum(len(seat.host) for seat in self._taken.values()), (
            "two blocks of a request are in one host slot"
        )
        assert {*self._resets, *(number for number, _ in self._places)} <= self._taken.keys()
