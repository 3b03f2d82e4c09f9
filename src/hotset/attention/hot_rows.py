"""The latent rows of hot requests: found in slots on the device, or brought there for a layer."""

from collections.abc import Callable, Sequence

import torch

from hotset.attention.seat_tables import SeatTables
from hotset.attention.spec import LayerAttention
from hotset.kernels import hot_reference
from hotset.kernels.hot_reference import Misses, RowRun
from hotset.memory.arena import DeviceArena
from hotset.metrics import HotCounts


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
        self._row_bytes = row_bytes
        selecting = [i for i, layer in enumerate(layers) if layer.index_dim]
        self._selections = {layer: number for number, layer in enumerate(selecting)}
        ends = [*selecting[1:], len(layers)]
        self._layers_of = [end - first for first, end in zip(selecting, ends, strict=True)]
        self._gather: Callable[..., None] = hot_reference.gather
        if arena.storage.is_cuda:
            from hotset.kernels.gather_rows import gather_rows

            self._gather = gather_rows

    def resolve(
        self, layer: int, positions: torch.Tensor, rows: torch.Tensor, seats: torch.Tensor
    ) -> Misses:
        """Complete the `rows` that a layer selected; see `SeatTables.resolve`."""
        return self.tables.resolve(self._selections[layer], positions, rows, seats)

    def counts(self) -> HotCounts:
        """What slots held and what was fetched so far; waits for the device.

        Raises:
            AssertionError: a selected token was in no memory, which is a bug: its request's tokens
                are wrong.
        """
        totals = self.tables.totals.tolist()
        assert not any(lost for _, _, lost in totals), "tokens of a hot request were lost"
        num_rows = sum(
            misses * num_layers
            for (_, misses, _), num_layers in zip(totals, self._layers_of, strict=True)
        )
        return HotCounts(
            sum(hits for hits, _, _ in totals),
            sum(misses for _, misses, _ in totals),
            num_rows * self._row_bytes,
        )

    def fetch(self, layer: int, misses: Misses) -> None:
        """Bring a layer's missing rows to the device; see `gather_rows`."""
        self._gather(self._host, self._blocks, *misses, self._runs[layer])
