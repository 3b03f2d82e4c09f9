"""State layers of a step by kernels that read and write slots in place."""

from collections.abc import Callable
from typing import Self

import torch
from transformers.activations import ACT2FN

from hotset.attention.batch import Batch
from hotset.attention.inputs import fill, to_device
from hotset.attention.mixers import MixerStep
from hotset.attention.scans import Convolution, GatedDelta, Mamba1, Mamba2, Scan
from hotset.attention.state_tables import NUM_COLUMNS, Array, SpanTables, TableSizes
from hotset.kernels.chunk_state import scan_delta, scan_mamba2
from hotset.kernels.conv_state import convolve
from hotset.kernels.decode_state import decode_delta, decode_mamba2
from hotset.kernels.selective_state import decode_mamba1, scan_mamba1
from hotset.kernels.state_inputs import ChunkTable, RowTable, SequenceTable, StepTables
from hotset.memory.state_arena import StateArena

_SILU = ("silu", "swish")


class KernelStates(MixerStep):
    """As `TorchStates`. What is recorded reads the tables when it is replayed.

    Args:
        arena: the slots.
        packed: `SpanTables.packed`, on the arena's device.
        sizes: of the tables in it.
        copies: see `SpanTables`.
    """

    def __init__(
        self,
        arena: StateArena,
        packed: torch.Tensor,
        sizes: TableSizes,
        copies: Array | None = None,
    ) -> None:
        self._arena, self._packed, self._copies = arena, packed, copies
        self.sizes = sizes
        rows, chunks, sequences = (
            part.view(NUM_COLUMNS, -1).unbind() for part in packed.split(sizes.parts)
        )
        self._tables = StepTables(RowTable(*rows), ChunkTable(*chunks), SequenceTable(*sequences))
        self._decodes = RowTable(*(row[: sizes.decodes] for row in rows))

    @classmethod
    def of_batch(cls, arena: StateArena, batch: Batch, device: torch.device) -> Self:
        """The states of one step."""
        tables = SpanTables(batch.sequences, batch.num_decodes)
        packed = to_device(tables.packed(tables.sizes), device)
        return cls(arena, packed, tables.sizes, tables.copies)

    @classmethod
    def of_padding(cls, arena: StateArena, sizes: TableSizes, device: torch.device) -> Self:
        """The states of steps that `fill` sets, of no sequence so far."""
        return cls(arena, to_device(SpanTables([], 0).packed(sizes), device), sizes)

    def fill(self, batch: Batch) -> bool:
        """Have what was recorded compute this step; False where it has more than there is room for.

        Then nothing was changed.
        """
        tables = SpanTables(batch.sequences, batch.num_decodes)
        if not self.sizes.hold(tables.sizes):
            return False
        fill(self._packed, tables.packed(self.sizes))
        self._copies = tables.copies
        return True

    def convolve(self, layer: int, convolution: Convolution) -> torch.Tensor:
        """See `MixerStep`."""
        values, weight, bias, activation = convolution
        output = values.new_empty(values.shape[::-1])
        columns, silu = self._arena.columns[layer], activation in _SILU
        convolve(values, weight, bias, output, columns, self._tables, silu=silu)
        if activation is not None and not silu:
            output = ACT2FN[activation](output)
        return output.T

    def scan(self, layer: int, scan: Scan) -> torch.Tensor:
        """See `MixerStep`."""
        pool, output = self._arena.recurrent[layer], scan.new_output()
        decode, chunks = KERNELS[type(scan)]
        if self.sizes.pads and self.sizes.decodes < self.sizes.tokens:
            output.zero_()  # beyond those that decode
        if self._decodes.reads.numel():
            decode(scan, output, pool, self._decodes)
        if self.sizes.sequences:
            chunks(scan, output, pool, self._tables)
        return output

    def finish(self) -> None:
        """See `MixerStep`: copies states that go to one more slot, each at once."""
        for source, target in self._copies if self._copies is not None else ():
            self._arena.memory[target].copy_(self._arena.memory[source])


KERNELS: dict[type[Scan], tuple[Callable[..., None], Callable[..., None]]] = {
    GatedDelta: (decode_delta, scan_delta),
    Mamba1: (decode_mamba1, scan_mamba1),
    Mamba2: (decode_mamba2, scan_mamba2),
}
