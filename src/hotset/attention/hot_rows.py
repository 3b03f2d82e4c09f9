"""The latent rows of hot requests: found in slots on the device, or brought there for a layer."""

from collections.abc import Sequence

import torch

from hotset.attention.seat_tables import SeatTables
from hotset.attention.spec import LayerAttention
from hotset.kernels.gather_rows import RowRun, gather_rows, gather_rows_reference
from hotset.kernels.resolve_rows import Misses
from hotset.memory.arena import DeviceArena


class HotRows:
    """Finds and fetches rows within a step, with nothing asked of the host.

    A layer that selects calls `resolve`; that layer, and each that shares its selection, calls
    `fetch` with what was missing before it attends.

    Args:
        tables: of the hot requests.
        arena: the device's blocks.
        host: `[slots, bytes]` uint8, host memory, where a slot has what a block has.
        layers: what each asks for: all select, and store rows of one width.
    """

    def __init__(
        self,
        tables: SeatTables,
        arena: DeviceArena,
        host: torch.Tensor,
        layers: Sequence[LayerAttention],
    ) -> None:
        self.tables = tables
        self._host, self._blocks = host, arena.storage.view(torch.uint8)
        row_bytes = arena.layers[0].stride(1) * arena.storage.itemsize
        run_bytes = arena.block_size * row_bytes
        self._runs = [
            RowRun(i * run_bytes, row_bytes, arena.block_size, len(layers) * arena.block_size)
            for i in range(len(layers))
        ]
        selecting = [i for i, layer in enumerate(layers) if layer.index_dim]
        self._selections = {layer: number for number, layer in enumerate(selecting)}
        self._gather = gather_rows if arena.storage.is_cuda else gather_rows_reference

    def resolve(
        self, layer: int, positions: torch.Tensor, rows: torch.Tensor, seats: torch.Tensor
    ) -> Misses:
        """Complete the `rows` that a layer selected; see `SeatTables.resolve`."""
        return self.tables.resolve(self._selections[layer], positions, rows, seats)

    def fetch(self, layer: int, misses: Misses) -> None:
        """Bring a layer's missing rows to the device; see `gather_rows`."""
        self._gather(self._host, self._blocks, *misses, self._runs[layer])
