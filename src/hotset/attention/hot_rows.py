"""The latent rows of hot requests: found in slots on the device, or brought there for a layer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from hotset.attention.seat_tables import SeatTables
from hotset.cost.hot_set import fetches
from hotset.cost.tuning import TUNINGS, Tuning
from hotset.kernels import hot_reference
from hotset.kernels.hot_reference import Misses, RowRun, Total
from hotset.memory.arena import DeviceArena, row_steps
from hotset.metrics import HotCounts

_TUNING = TUNINGS["cuda"]
_BESIDE = replace(
    _TUNING,
    gather_programs=_TUNING.gather_programs_beside,
    gather_rows=_TUNING.gather_rows_beside,
)


class HotRows:
    """Finds and fetches rows within a step, with nothing asked of the host.

    A layer that selects calls `resolve`, then `begin` with what was missing. That layer, and each
    that shares its selection, calls `fetch` before it attends. `guess` fetches for a later layer
    that selects; whatever it fetched, `resolve` finds what that layer selects.

    Args:
        tables: of the hot requests.
        arena: the device's blocks; each of its groups selects.
        host: `[slots, bytes]` uint8, host memory, where a slot has what a block has.
        fetches_ahead: whether the rows of layers that share a selection come while the layers
            before them compute, on a GPU, and not all with the rows of the first
            layer. They are the same rows.

    Attributes:
        num_seats: requests that can be hot at once.
    """

    def __init__(
        self,
        tables: SeatTables,
        arena: DeviceArena,
        host: torch.Tensor,
        *,
        fetches_ahead: bool = False,
    ) -> None:
        self.tables, self.num_seats = tables, tables.num_seats
        self._host, self._blocks = host, arena.storage.view(torch.uint8)
        self._row_bytes = arena.layers[0][0, 0].nbytes
        self._groups = {group.start: group for group in arena.groups}
        self._selections = {layer: number for number, layer in enumerate(self._groups)}
        # By the first of the layers whose rows come at once.
        self._runs = {
            layers.start: _run(arena, layers)
            for group in arena.groups
            for layers in fetches(group, ahead=fetches_ahead)
        }
        self._starts = {
            first: [layer for layer in group if layer in self._runs]
            for first, group in self._groups.items()
        }
        self._first = {layer: first for first, starts in self._starts.items() for layer in starts}
        # What is missing of a guess, for the rows of the layers that share the selection, too.
        self._guessed: dict[int, list[Misses]] = {}
        self._gather: Callable[..., None] = hot_reference.gather
        if arena.storage.is_cuda:
            from hotset.kernels.gather_rows import gather_rows

            self._gather = gather_rows
        self._ahead = None
        if fetches_ahead and arena.storage.is_cuda:
            self._ahead = _Ahead(arena.storage.device, len(arena.layers))

    def resolve(
        self, layer: int, positions: torch.Tensor, rows: torch.Tensor, seats: torch.Tensor
    ) -> Misses:
        """Complete the `rows` that a layer selected; see `SeatTables.resolve`."""
        return self.tables.resolve(self._selections[layer], positions, rows, seats)

    def next_layer(self, layer: int) -> int:
        """The next layer that selects after one that does."""
        return self._groups[layer].stop

    def counts(self) -> HotCounts:
        """What slots held and what was fetched so far; waits for the device.

        Raises:
            AssertionError: a selected token was in no memory, which is a bug: its request's tokens
                are wrong.
        """
        totals = self.tables.totals.tolist()
        assert not any(each[Total.LOST] for each in totals), "tokens of a hot request were lost"
        num_rows = sum(
            (each[Total.MISSED] + each[Total.GUESSED]) * len(group)
            for each, group in zip(totals, self._groups.values(), strict=True)
        )
        sums = [sum(column) for column in zip(*totals, strict=True)]
        return HotCounts(
            hits=sums[Total.HIT],
            misses=sums[Total.MISSED],
            guessed=sums[Total.GUESSED],
            guessed_right=sums[Total.GUESSED_RIGHT],
            moved_bytes=num_rows * self._row_bytes,
        )

    def begin(self, layer: int, misses: Sequence[Misses]) -> None:
        """Have the missing rows of a layer that selected come, and those of layers that share them.

        Only where they come on a stream beside: else `fetch` brings them.

        Args:
            layer: that selected.
            misses: to be kept until the last of these layers called `fetch`.
        """
        if self._ahead is not None:
            self._ahead.run(self._starts[layer], partial(self._fetch, misses, first=layer))

    def fetch(self, layer: int, misses: Sequence[Misses]) -> None:
        """Have a layer's missing rows on the device before what comes next; see `gather_rows`.

        All layers that share a selection call it in turn, with the same `misses`.
        """
        if layer not in self._runs:
            return  # they came with the rows of a layer before
        if self._ahead is not None:
            self._ahead.wait_for(layer)
        else:
            self._fetch(misses, layer, first=self._first[layer])

    def guess(
        self, layer: int, chosen: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> None:
        """Fetch what the next layer that selects is guessed to, and what its slots do not hold.

        To be called after `fetch` of the layer that selected last, once in a step. The rows are
        there when `fetch` of the next one has brought what it did select; those of the layers that
        share its selection come with what these lack.

        Args:
            layer: that selected last.
            chosen: for some of the step's tokens each, positions, rows and seats as
                `SeatTables.resolve` takes them. The rows are mutated.
        """
        ahead = self.next_layer(layer)
        number = self._selections[ahead]
        missing = [self.tables.resolve(number, *each, is_guess=True) for each in chosen]
        if self._ahead is None:
            self._gather_run(missing, ahead)
        else:
            self._ahead.run([ahead], partial(self._gather_run, missing, tuning=_BESIDE))
        # Who read what it replaces, in the step before, has been waited for since.
        self._guessed[ahead] = missing

    def _fetch(self, misses: Sequence[Misses], layer: int, *, first: int) -> None:
        """Fetch rows of a layer that lacks them as the one that selected, `first`, does.

        Those of other layers come while kernels run, and with them what was guessed.
        """
        if layer == first:
            self._gather_run(misses, layer)
        else:
            # A slot of a guess may have been taken for what was selected, which comes after it.
            lists = [*self._guessed.get(first, ()), *misses]
            self._gather_run(lists, layer, **({} if self._ahead is None else {"tuning": _BESIDE}))

    def _gather_run(self, misses: Sequence[Misses], layer: int, **tuning: Tuning) -> None:
        for each in misses:
            self._gather(self._host, self._blocks, *each, self._runs[layer], **tuning)


def _run(arena: DeviceArena, layers: range) -> RowRun:
    cache = arena.layers[layers.start]
    start_bytes = cache.data_ptr() - arena.storage.data_ptr()
    row_bytes = cache[0, 0].nbytes
    return RowRun(start_bytes, row_bytes, len(layers), arena.block_size, *row_steps(cache))


class _Ahead:
    """Work for later layers, on a stream beside the one that computes. Graphs can record it."""

    def __init__(self, device: torch.device, num_layers: int) -> None:
        # Ahead of the kernels that compute, whose programs would be done before the first row came.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._started = torch.cuda.Event()
        self._done = [torch.cuda.Event() for _ in range(num_layers)]

    def run(self, layers: Sequence[int], work: Callable[[int], None]) -> None:
        """Start `work` for each of these layers, in order, after what was submitted."""
        self._started.record()
        self._stream.wait_event(self._started)
        with torch.cuda.stream(self._stream):
            for layer in layers:
                work(layer)
                self._done[layer].record()

    def wait_for(self, layer: int) -> None:
        """Have what is submitted next wait for a layer's work."""
        torch.cuda.current_stream().wait_event(self._done[layer])
