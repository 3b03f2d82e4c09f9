"""What tiers copy from the device and to it: blocks of KV, and pieces of states."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

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

    def places(self, runs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Runs with places that are the same on all ranks, one memory after another.

        Args:
            runs: `[N, 3]`: an address here, a place in host memory, and bytes.

        Returns:
            `[M, 3]`: N, and more where one goes on from one memory to another beside it.
        """
        parts = []
        for start, first, num_bytes in self._spans():
            begin = np.maximum(runs[:, 0], start)
            size = np.minimum(runs[:, 0] + runs[:, 2], start + num_bytes) - begin
            part = np.stack([begin - start + first, runs[:, 1] + begin - runs[:, 0], size], 1)
            parts.append(part[size > 0])
        return np.concatenate(parts)

    def addresses(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The addresses here of what `places` made of those of another rank."""
        addresses = np.empty_like(places)
        for start, first, num_bytes in self._spans():
            is_here = (places >= first) & (places < first + num_bytes)
            addresses[is_here] = places[is_here] - first + start
        return addresses

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """The address, the first place and the bytes of each memory."""
        first = 0
        for memory in self.memories:
            yield memory.data_ptr(), first, memory.nbytes
            first += memory.nbytes
