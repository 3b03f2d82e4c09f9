"""What tiers copy from the device and to it: blocks of KV, and pieces of states."""

from hotset.memory.arena import DeviceArena
from hotset.memory.state_arena import StateArena
from hotset.memory.state_pieces import StatePieces


class DevicePayloads:
    """The device's memory by numbers: first the blocks of KV, then the pieces of states.

    Args:
        arena: the blocks.
        states: slots of states; None where layers keep none.

    Attributes:
        block_bytes: of a block, and the most of a piece.
        memories: uint8, all that the numbers name.
        pieces: the numbers of states; None where there are none.
    """

    def __init__(self, arena: DeviceArena, states: StateArena | None = None) -> None:
        self.block_bytes = arena.block_bytes
        self.memories = [arena.memory]
        self.pieces: StatePieces | None = None
        self._arena = arena
        if states is not None:
            self.memories.append(states.memory)
            self.pieces = StatePieces(arena.num_blocks, states.slot_bytes, arena.block_bytes)

    def runs(self, number: int) -> list[tuple[int, int, int]]:
        """The `(address, place in its payload, bytes)` of a block's or a piece's content."""
        if self.pieces is None or number < self.pieces.first:
            return self._arena.runs(number)
        start, num_bytes = self.pieces.span(number)
        return [(self.memories[-1].data_ptr() + start, 0, num_bytes)]
