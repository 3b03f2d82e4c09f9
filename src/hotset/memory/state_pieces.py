"""States as payloads of one block's size: their pieces have numbers of their own.

Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StatePieces:
    """The numbers by which tiers know the pieces of states: those after the blocks of the device.

    Attributes:
        first: the number of the first piece of slot 0: how many blocks the device has.
        slot_bytes: of one state.
        block_bytes: of a piece, of which the last one of a state may be shorter.
    """

    first: int
    slot_bytes: int
    block_bytes: int

    @property
    def per_state(self) -> int:
        """Pieces of one state."""
        return -(-self.slot_bytes // self.block_bytes)

    def of_slot(self, slot: int) -> range:
        """The numbers of the pieces of a slot, in order."""
        start = self.first + slot * self.per_state
        return range(start, start + self.per_state)

    def span(self, number: int) -> tuple[int, int]:
        """Where a piece starts in the memory of all slots, and how many bytes it has."""
        slot, piece = divmod(number - self.first, self.per_state)
        start = piece * self.block_bytes
        num_bytes = min(self.block_bytes, self.slot_bytes - start)
        return slot * self.slot_bytes + start, num_bytes
