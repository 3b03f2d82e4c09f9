"""The experts of one layer, some in slots on the device: finding, fetching and computing them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from hotset.cost.experts import LayerSlots, streams_from
from hotset.cost.rates import Rates
from hotset.cost.routing import reach
from hotset.experts.compute import (
    Multiply,
    bounds_of,
    by_group,
    grouped,
    has_grouped_kernel,
    in_turn,
    is_fused,
    weighted_sum,
)
from hotset.experts.cpu import ColdLayer
from hotset.experts.host import ColdSource
from hotset.experts.prefetch import Prefetch
from hotset.experts.residency import SlotTable
from hotset.experts.slots import Slots
from hotset.experts.staging import Staging
from hotset.experts.weights import Experts, LayerExperts

# By pass: experts, and the slots that they come to; both on the device.
Copies = list[tuple[torch.Tensor, torch.Tensor]]

# Share of a layer's experts that a step is expected to need, from which on all are read ahead.
_READ_AHEAD_FROM = 0.9


class LayerBuffer:
    """Computes the hosted experts of one layer, as `dynamic_experts` asks.

    A step either caches, bringing the experts that it needs and that have no slot into slots, in
    passes; or streams, all experts without a slot coming through a staging buffer.

    Args:
        index: of the layer among those with experts.
        experts: of the layer, hosted.
        table: which of them are in which of the `slots`.
        staging: None where no step streams.
        prefetch: None where nothing is copied ahead in steps that cache.
        bring: `cache`, `stream`, or `auto` for what is sooner done in each step.
        streamed: `[1]` int64 on the device, to be added to: experts that came by streaming, or when
            another slot was taken in use.
        rates: of copies of experts and of the device's memory.

    Attributes:
        source: where all experts are.
        next: the layer that a step runs after this one; None for the last.
        cold: has the CPU compute experts that are not here; None where it does not.
        top_k: experts of a token, once a step has run.
    """

    def __init__(
        self,
        index: int,
        experts: LayerExperts,
        table: SlotTable,
        slots: Slots,
        *,
        staging: Staging | None,
        prefetch: Prefetch | None,
        bring: str,
        streamed: torch.Tensor,
        rates: Rates,
    ) -> None:
        self.experts, self.table, self.slots = experts, table, slots
        self.source = experts.source
        self._copy_s = self.source.payload_bytes / rates.expert_bytes_per_s
        self._read_s = (slots.narrow or slots.layout).payload_bytes / rates.memory_bytes_per_s
        self._index = index
        self._staging, self._prefetch = staging, prefetch
        self._bring, self._streamed = bring, streamed
        self._addresses: dict[int, torch.Tensor] = {}  # by passes; 0 is for streamed steps
        self.next: LayerBuffer | None = None
        self.cold: ColdLayer | None = None
        self.top_k = 0
        self._is_filled = False
        self._fill()
        self._is_grouped = slots.weights is not None and all(map(has_grouped_kernel, slots.weights))

    def streams(self, num_tokens: int, top_k: int) -> bool:
        """Whether a step of `num_tokens` tokens streams."""
        if self._staging is None:
            return False
        if self._bring != "auto":
            return self._bring == "stream"
        slots = LayerSlots(
            self.table.num_experts, self.table.num_active, self._copy_s, self._read_s
        )
        return num_tokens >= streams_from(slots, top_k)

    def resize(self, num_slots: int) -> None:
        """Change the number of slots in use: to fewer, or to one more, whose expert is copied."""
        if num_slots < self.table.num_active:
            self.table.shrink(num_slots)
            self.slots.drop(num_slots)
        else:
            assert num_slots == self.table.num_active + 1
            self.fetch(*self.table.grow())
            self._streamed += 1

    def fetch(self, experts: torch.Tensor, places: torch.Tensor) -> None:
        """Copy `experts`, `[N]` and -1 for none, to the slots `places`."""
        self.source.fetch(self.slots, experts, places)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        layer: Experts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `dynamic_experts`, with the same result."""
        num_tokens, self.top_k = top_k_index.shape
        if not self._is_filled:
            self._fill()
        self._is_filled = False  # until the table has told the truth to the end
        wanted = top_k_index.reshape(-1)
        work, streams = None, False
        if self.cold is not None and self.cold.shared.takes(num_tokens):
            wanted, work = self.cold.begin(hidden_states, wanted)
        else:
            streams = self.streams(num_tokens, self.top_k)
        if streams:
            self._streamed += self.table.num_absent
        is_narrow = self.slots.narrow is not None
        if is_narrow or is_fused(self.experts, self.slots.weights, len(wanted)):
            ids = wanted.view(top_k_index.shape)
            out = self._fused(hidden_states, ids, top_k_weights, streams)
            if self.cold is not None and work is not None:
                out += self.cold.weighted(work, top_k_weights)
        else:
            compute = self._grouped if self._is_grouped else self._in_turn
            rows = compute(layer, hidden_states, wanted, streams)  # [T * K, H]
            if self.cold is not None and work is not None:
                self.cold.finish(rows, work)
            dtype = hidden_states.dtype
            out = weighted_sum(layer, self.experts, rows, top_k_index, top_k_weights, dtype)
        self._is_filled = True
        return out

    def _in_turn(
        self, layer: Experts, hidden: torch.Tensor, ids: torch.Tensor, streams: bool
    ) -> torch.Tensor:
        """`[T * K, H]`, one expert after another; the host reads what is needed."""
        _, order, ends = by_group(ids, self.table.num_experts)
        rows = hidden[order // self.top_k]
        out = torch.zeros_like(rows)
        if streams:
            staged, places = self._staged()
            multiply = self._multiply(places, staged)
            in_turn(layer, self.experts, rows, out, bounds_of(ends), multiply)
        else:
            for bounds in self._fetched(ids, bounds_of(ends)):
                multiply = self._multiply(self.table.slots())
                in_turn(layer, self.experts, rows, out, bounds, multiply)
            self._look_ahead(hidden)
        back = torch.empty_like(out)
        back[order] = out
        return back

    def _multiply(self, places: torch.Tensor, staged: Slots | None = None) -> Multiply:
        """The products of experts, which are at these places: slots, and then those of `staged`."""
        at, num_slots = places.tolist(), self.table.num_slots

        def multiply(which: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
            place = at[expert]
            if place < num_slots:
                return self.slots.product(which, place, rows)
            assert staged is not None
            return staged.product(which, place - num_slots, rows)

        return multiply

    def _staged(self) -> tuple[Slots, torch.Tensor]:
        """The experts without a slot, and the places of all; see `Staging.take`."""
        assert self._staging is not None
        return self._staging.take(self._index)

    def _fetched(
        self, ids: torch.Tensor, bounds: dict[int, tuple[int, int]]
    ) -> Iterator[dict[int, tuple[int, int]]]:
        """By pass, the bounds of its experts, which have slots until the next pass begins."""
        if self._prefetch is not None:
            self._prefetch.join()
        which_pass = self.table.begin(ids)
        last = self.table.num_passes(len(ids))

        def missing() -> list[int]:
            is_missing = (which_pass < last) & (self.table.slots() < 0)
            found: list[int] = is_missing.nonzero().flatten().tolist()
            return found

        self._expect(missing, len(ids))
        passes = which_pass.tolist()
        for number in range(last):
            these = {expert: pair for expert, pair in bounds.items() if passes[expert] == number}
            if not these:
                break
            self.fetch(*self.table.load(which_pass == number))
            yield these

    def _grouped(
        self, layer: Experts, hidden: torch.Tensor, ids: torch.Tensor, streams: bool
    ) -> torch.Tensor:
        """`[T * K, H]` by grouped products, in passes of fixed shape; nothing is asked of the host.

        Rows are sorted by pass, then slot. A pass computes all rows, beginning with its own: what
        comes after those belongs to no group and is not computed.
        """
        num_rows = len(ids)
        places = torch.arange(num_rows, device=ids.device)
        # One row more: those that are not a pass's own go there.
        out = hidden.new_zeros(num_rows + 1, hidden.shape[1])
        num_experts, num_slots = self.table.num_experts, self.table.num_slots
        held = [self.slots]
        copies: Copies = []
        if streams:
            staged, keys_of = self._staged()
            held.append(staged)
            sizes = [num_slots, self.table.most_absent]
        else:
            keys_of, copies = self._arrange(ids)
            held *= len(copies)
            sizes = [num_slots] * len(copies)
        _, order, ends = by_group(keys_of[ids.clamp(max=num_experts)], sum(sizes))
        done = 0
        for number, (slots, size) in enumerate(zip(held, sizes, strict=True)):
            if size == 0:
                continue
            self._fetch_pass(copies, hidden, number)
            start = ends[done - 1] if done else None
            offsets = ends[done : done + size] - (0 if start is None else start)
            source = order if start is None else order[(places + start) % num_rows]
            rows = hidden[source // self.top_k]
            assert slots.weights is not None
            rows = grouped(
                layer,
                self.experts,
                rows,
                slots.weights,
                ids[source],
                offsets,
                is_transposed=self.source.layout.is_transposed,
            )
            out.index_copy_(0, torch.where(places < offsets[-1], source, num_rows), rows)
            done += size
        return out[:-1]

    def _fused(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, streams: bool
    ) -> torch.Tensor:
        """`[T, H]` by the fused kernels, which find each expert by its address.

        A step that streams is one pass over slots and staging together. In a pass of one that
        caches, experts that are not its own have the address 0, and their rows are left out.
        """
        from hotset.kernels.fused_experts import fused_experts
        from hotset.kernels.narrow_experts import narrow_experts

        copies: Copies = []
        if streams:
            staged, keys_of = self._staged()
            table = self._addresses_of_all(staged)
        else:
            keys_of, copies = self._arrange(ids.view(-1))
            table = self._addresses_of_passes(len(copies))
        up, down = table.index_select(2, keys_of[: self.table.num_experts])  # [P, E]
        rows = hidden.contiguous(), ids.contiguous(), weights.contiguous()
        before_pass = partial(self._fetch_pass, copies, hidden)
        if (narrow := self.slots.narrow) is not None:
            gate, biases = self.experts.gate, self.experts.biases
            assert gate is not None
            return narrow_experts(*rows, up, narrow, gate, biases=biases, before_pass=before_pass)
        middle_size = self.source.layout.down[1]
        return fused_experts(*rows, up, down, middle_size, before_pass=before_pass)

    def _addresses_of_passes(self, num_passes: int) -> torch.Tensor:
        """`[2, P, P * S + 1]`: up and down addresses in each pass, by `SlotTable.arrange`.

        Made once, before a step of `num_passes` passes is recorded.
        """
        if num_passes not in self._addresses:
            num_slots = self.table.num_slots
            size = (2, num_passes, num_passes * num_slots + 1)
            table = torch.zeros(size, dtype=torch.int64, device=self._streamed.device)
            for number in range(num_passes):
                first = number * num_slots
                table[:, number, first : first + num_slots] = self.slots.addresses()
            self._addresses[num_passes] = table
        return self._addresses[num_passes]

    def _addresses_of_all(self, staged: Slots) -> torch.Tensor:
        """`[2, 1, S + A]`: up and down addresses, by what `SlotTable.absent` says of places.

        Made once: a layer always has the same staging buffer.
        """
        if 0 not in self._addresses:
            parts = [self.slots.addresses(), staged.addresses()]
            self._addresses[0] = torch.cat(parts, 1).unsqueeze(1)
        return self._addresses[0]

    def _arrange(self, ids: torch.Tensor) -> tuple[torch.Tensor, Copies]:
        """`SlotTable.arrange`: where experts are, and by pass which come to which slots."""
        keys, experts, slots = self.table.arrange(ids)
        self._expect(lambda: [e for e in experts.flatten().tolist() if e >= 0], len(ids))
        if self._prefetch is not None:
            self._prefetch.join()
        return keys, list(zip(experts, slots, strict=True))

    def _fetch_pass(self, copies: Copies, hidden: torch.Tensor, number: int) -> None:
        """Begin a pass: fetch its experts, where the step caches and so has `copies`."""
        if copies:
            self.fetch(*copies[number])
        if number == len(copies) - 1:  # the link is idle from here on
            self._look_ahead(hidden)

    def _look_ahead(self, hidden: torch.Tensor) -> None:
        """Start to copy what the next layer is likely to need."""
        if self._prefetch is None or self.next is None:
            return
        ids = self._prefetch.predict(self._index + 1, hidden)
        self._prefetch.start(self.next.table.prefetch(ids, self._prefetch.most), self.next.fetch)

    def _fill(self) -> None:
        """Bring the experts that have slots at first."""
        self.table.reset()
        first = torch.arange(self.table.num_active, device=self._streamed.device)
        self._expect(first.tolist, 0)
        self.fetch(first, first)
        self._is_filled = True

    def _expect(self, experts: Callable[[], list[int]], num_ids: int) -> None:
        """Tell the source what is fetched next, in the order of use, of this layer and the next."""
        self.source.expect(experts, lambda: self._ahead(num_ids))

    def _ahead(self, num_ids: int) -> list[tuple[ColdSource, int]]:
        """The experts that the next layer lacks, if a step of `num_ids` ids needs most of them."""
        num_tokens = num_ids // max(1, self.top_k)
        share = reach(self.top_k / self.table.num_experts, num_tokens)
        if self.next is None or share < _READ_AHEAD_FROM:
            return []
        absent = (self.next.table.slots() < 0).nonzero().flatten().tolist()
        return [(self.next.source, expert) for expert in absent]
