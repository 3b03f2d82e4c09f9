"""The latent rows of hot requests: found in slots on the device, or brought there for a layer."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hotset.attention.seat_tables import SeatTables
from hotset.attention.spec import LayerAttention
from hotset.cost.tuning import TUNINGS, Tuning
from hotset.kernels import hot_reference
from hotset.kernels.hot_reference import Misses, RowRun
from hotset.memory.arena import DeviceArena
from hotset.metrics import HotCounts

_TUNING = TUNINGS["cuda"]
_BESIDE = replace(_TUNING, gather_programs=_TUNING.gather_programs_beside)


class HotRows:
    """Finds and fetches rows within a step, with nothing asked of the host.

    A layer that selects calls `resolve`; that layer, and each that shares its selection, calls
    `fetch` with what was missing before it attends.

    Args:
        tables: of the hot requests.
        arena: the device's blocks.
        host: `[slots, bytes]` uint8, host memory, where a slot has what a block has.
        layers: what each asks for: all select, and store rows of one width.
        fetches_ahead: whether the rows of layers that share a selection come while the layers
            before them compute, on a GPU. They are the same rows.
    """

    def __init__(
        self,
        tables: SeatTables,
        arena: DeviceArena,
        host: torch.Tensor,
        layers: Sequence[LayerAttention],
        *,
        fetches_ahead: bool = False,
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
        self._ahead = None
        if fetches_ahead and arena.storage.is_cuda:
            self._ahead = _Ahead(arena.storage.device, len(layers))

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

    def fetch(self, layer: int, misses: Sequence[Misses]) -> None:
        """Bring a layer's missing rows to the device before what comes next; see `gather_rows`.

        All layers that share a selection call it in turn, with the same `misses`.
        """
        if self._ahead is not None and layer not in self._selections:
            self._ahead.wait_for(layer)
            return
        self._fetch(layer, misses)
        if self._ahead is not None:
            sharing = range(layer + 1, layer + self._layers_of[self._selections[layer]])
            self._ahead.run(sharing, lambda other: self._fetch(other, misses, tuning=_BESIDE))

    def _fetch(self, layer: int, misses: Sequence[Misses], **tuning: Tuning) -> None:
        for each in misses:
            self._gather(self._host, self._blocks, *each, self._runs[layer], **tuning)


class _Ahead:
    """Work for later layers, on a stream beside the one that computes. Graphs can record it."""

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self._stream, self._started = torch.cuda.Stream(device), torch.cuda.Event()
        self._done = [torch.cuda.Event() for _ in range(num_layers)]

    def run(self, layers: range, work: Callable[[int], None]) -> None:
        """Start `work` for each layer after what was submitted; each waits for its own."""
        if not layers:
            return
        self._started.record()
        self._stream.wait_event(self._started)
        with torch.cuda.stream(self._stream):
            for layer in layers:
                work(layer)
                self._done[layer].record()

    def wait_for(self, layer: int) -> None:
        """Have what is submitted next wait for a layer's work."""
        torch.cuda.current_stream().wait_event(self._done[layer])
