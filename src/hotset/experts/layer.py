"""The experts of one layer, some in slots on the device: finding, fetching and computing them."""

from typing import Any

import torch
from torch.nn import functional

from hotset.cost.experts import LayerSlots, streams_from
from hotset.cost.rates import Rates
from hotset.cost.routing import reach
from hotset.experts.cpu import ColdLayer
from hotset.experts.gating import Experts, has_grouped_kernel, up_name
from hotset.experts.host import HostExperts, StoredExperts
from hotset.experts.prefetch import Prefetch
from hotset.experts.residency import SlotTable
from hotset.experts.resident import (
    FUSED_MOST_ROWS_PER_EXPERT,
    applies_silu_gate,
    has_fused_kernel,
)
from hotset.experts.slots import Slots, Staging
from hotset.experts.store import DiskExperts

# Share of a layer's experts that a step is expected to need, from which on all are read ahead.
_READ_AHEAD_FROM = 0.9


class LayerBuffer:
    """The experts of one layer, for `dynamic_experts` to call.

    Attributes:
        next: the layer that a step runs after this one; None for the last.
        cold: has the CPU compute experts that are not here; None where it does not.
        top_k: experts of a token, once a step has run.

    Args:
        staging: None where the plan is *cache* only.
        prefetch: None where nothing is copied ahead in steps of the plan *cache*.
        plan: `cache`, `stream` or `auto`.
        streamed: `[1]` int64 on the device, to be added to: experts that came by streaming, or when
            another slot was taken in use.
        rates: of copies of experts and of the device's memory.
        memory: of the slots; see `Slots`.
    """

    def __init__(
        self,
        index: int,
        host: HostExperts | DiskExperts,
        table: SlotTable,
        staging: Staging | None,
        prefetch: Prefetch | None,
        *,
        plan: str,
        streamed: torch.Tensor,
        rates: Rates,
        packed: bool,
        is_transposed: bool,
        memory: torch.Tensor | None = None,
    ) -> None:
        self.host, self.table = host, table
        self._copy_s = host.payload_bytes / rates.expert_bytes_per_s
        self._read_s = host.layout.payload_bytes / rates.memory_bytes_per_s
        self._index, self._staging, self._plan = index, staging, plan
        self._streamed = streamed
        self._prefetch = prefetch
        self._addresses: dict[int, torch.Tensor] = {}  # by passes; 0 is for streamed steps
        self.next: LayerBuffer | None = None
        self.cold: ColdLayer | None = None
        self.top_k = 0
        self._is_transposed = is_transposed
        self.slots = Slots(
            table.num_slots, host.layout, streamed.device, packed=packed, memory=memory
        )
        self._is_filled = False
        self._fill()
        self._is_grouped = not packed and has_grouped_kernel(self.slots.up)

    def streams(self, num_tokens: int, top_k: int) -> bool:
        """Whether a step of so many tokens streams."""
        if self._plan != "auto":
            return self._plan == "stream"
        slots = LayerSlots(
            self.table.num_experts, self.table.num_active, self._copy_s, self._read_s
        )
        return num_tokens >= streams_from(slots, top_k)

    def resize(self, num_slots: int) -> None:
        """Have so many slots in use: fewer than now, or one more, whose expert is copied."""
        if num_slots < self.table.num_active:
            self.table.shrink(num_slots)
            self.slots.drop(num_slots)
        else:
            assert num_slots == self.table.num_active + 1
            self._fetch(*self.table.grow())
            self._streamed += 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        layer: Experts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `dynamic_experts`, with the same result."""
        self.top_k = top_k_index.shape[1]
        if not self._is_filled:
            self._fill()
        self._is_filled = False  # until the table has told the truth to the end
        out = self._forward(layer, hidden_states, top_k_index, top_k_weights)
        self._is_filled = True
        return out

    def _forward(
        self,
        layer: Experts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        num_tokens, top_k = top_k_index.shape
        ids = wanted = top_k_index.reshape(-1)
        work, streams = None, False
        if self.cold is not None and self.cold.shared.takes(num_tokens):
            wanted, work = self.cold.begin(layer, hidden_states, ids)
        else:
            streams = self.streams(num_tokens, top_k)
        if streams:
            self._streamed += self.table.num_absent
        if self._is_fused(layer, len(ids)):
            out = self._fused(hidden_states, wanted.view(-1, top_k), top_k_weights, streams)
            if self.cold is not None and work is not None:
                out += self.cold.weighted(work, top_k_weights)
            return out
        compute = self._grouped if self._is_grouped else self._in_turn
        rows = compute(layer, hidden_states, wanted, top_k, streams)  # [T * K, H]
        if self.cold is not None and work is not None:
            self.cold.finish(rows, work)
        if getattr(layer, "has_post_expert_norm", False):
            rows = layer.post_expert_norm(rows)
        if getattr(layer, "_is_expert_parallel", True):
            rows = rows.masked_fill((ids >= self.table.num_experts).unsqueeze(-1), 0)
        weighted = rows.view(num_tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
        summed: torch.Tensor = weighted.sum(1)
        return summed.to(hidden_states.dtype)

    def _in_turn(
        self, layer: Experts, hidden: torch.Tensor, ids: torch.Tensor, top_k: int, streams: bool
    ) -> torch.Tensor:
        """`[T * K, H]`, one expert after another; the host reads what is needed."""
        sorted_ids, order = torch.sort(ids, stable=True)
        experts = torch.arange(self.table.num_experts, device=ids.device, dtype=ids.dtype)
        ends = torch.searchsorted(sorted_ids, experts, right=True).tolist()
        bounds = dict(enumerate(zip([0, *ends], ends, strict=False)))
        needed = [expert for expert, (start, end) in bounds.items() if start < end]
        rows = hidden[order // top_k]
        out = torch.zeros_like(rows)
        if streams:
            assert self._staging is not None
            staged, places = self._staging.take(self._index)
            slots, num_slots = places.tolist(), self.table.num_slots
            found = {
                e: (self.slots, slots[e])
                if slots[e] < num_slots
                else (staged, slots[e] - num_slots)
                for e in needed
            }
            self._run(layer, rows, out, bounds, found)
        else:
            if self._prefetch is not None:
                self._prefetch.join()
            which = self.table.begin(ids)
            last = self.table.num_passes(len(ids))
            if isinstance(self.host, DiskExperts):
                missing = (which < last) & (self.table.slots() < 0)
                self._expect(self.host, missing.nonzero().flatten().tolist(), len(ids))
            passes = which.tolist()
            for number in range(last):
                wanted = [expert for expert in needed if passes[expert] == number]
                if not wanted:
                    break
                self._fetch(*self.table.load(which == number))
                slots = self.table.slots().tolist()
                self._run(layer, rows, out, bounds, {e: (self.slots, slots[e]) for e in wanted})
            self._look_ahead(hidden)
        back = torch.empty_like(out)
        back[order] = out
        return back

    def _run(
        self,
        layer: Experts,
        rows: torch.Tensor,
        out: torch.Tensor,
        bounds: dict[int, tuple[int, int]],
        places: dict[int, tuple[Slots, int]],
    ) -> None:
        """Compute the rows of some experts, `bounds` by expert, into the same rows of `out`."""

        def product(which: int, name: str, source: torch.Tensor, target: Any) -> torch.Tensor:
            for expert, (slots, slot) in places.items():
                start, end = bounds[expert]
                piece = slots.product(which, slot, source[start:end], self._is_transposed)
                if layer.has_bias:
                    piece += getattr(layer, f"{name}_bias")[expert]
                if target is None:
                    target = piece.new_zeros(len(source), piece.shape[1])
                target[start:end] = piece
            assert target is not None
            result: torch.Tensor = target
            return result

        if places:
            # All rows, in their places: vector instructions round as they do with all experts.
            middle = product(0, up_name(layer), rows, None)
            middle = layer._apply_gate(middle) if layer.has_gate else layer.act_fn(middle)
            product(1, "down_proj", middle, out)

    def _grouped(
        self, layer: Experts, hidden: torch.Tensor, ids: torch.Tensor, top_k: int, streams: bool
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
        slots = [self.slots]
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # by pass: experts, slots
        if streams:
            assert self._staging is not None
            staged, keys_of = self._staging.take(self._index)
            slots.append(staged)
            sizes = [num_slots, self.table.most_absent]
        else:
            keys_of, copies = self._plan_step(ids)
            slots *= len(copies)
            sizes = [num_slots] * len(copies)
        keys = keys_of[ids.clamp(max=num_experts)]
        sorted_keys, order = torch.sort(keys, stable=True)
        groups = torch.arange(sum(sizes), device=ids.device, dtype=keys.dtype)
        ends = torch.searchsorted(sorted_keys, groups, right=True, out_int32=True)
        done = 0
        for number, (held, size) in enumerate(zip(slots, sizes, strict=True)):
            if size == 0:
                continue
            if copies:
                self._fetch_pass(copies, number, hidden)
            start = ends[done - 1] if done else None
            offsets = ends[done : done + size] - (0 if start is None else start)
            source = order if start is None else order[(places + start) % num_rows]
            rows = hidden[source // top_k]
            rows = self._product(layer, up_name(layer), rows, held.up, ids[source], offsets)
            rows = layer._apply_gate(rows) if layer.has_gate else layer.act_fn(rows)
            rows = self._product(layer, "down_proj", rows, held.down, ids[source], offsets)
            out.index_copy_(0, torch.where(places < offsets[-1], source, num_rows), rows)
            done += size
        return out[:-1]

    def _is_fused(self, layer: Experts, num_rows: int) -> bool:
        """Whether the fused kernels compute the layer, as if all its experts were resident."""
        if self.slots.payloads is None or not has_fused_kernel(self.slots.up):
            return False
        if not applies_silu_gate(layer) or any(size % 8 for size in self.host.layout.down):
            return False
        is_large = num_rows > FUSED_MOST_ROWS_PER_EXPERT * self.table.num_experts
        return not is_large or self.host.layout.dtype == torch.float16

    def _fused(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, streams: bool
    ) -> torch.Tensor:
        """`[T, H]` by the fused kernels, which find each expert by its address.

        A streamed step is one pass over slots and staging together. In a pass of the other plan
        experts that are not its own have the address 0, and their rows are left out.
        """
        from hotset.kernels.expert_routing import route_rows
        from hotset.kernels.fused_experts import gated_up, sum_rows, tiles_for, weighted_down

        hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
        num_experts, top_k = self.table.num_experts, ids.shape[1]
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        if streams:
            assert self._staging is not None
            staged, keys_of = self._staging.take(self._index)
            table = self._addresses_of_all(staged)
        else:
            keys_of, copies = self._plan_step(ids.view(-1))
            table = self._addresses_of_passes(len(copies))
        up, down = table.index_select(2, keys_of[:num_experts])  # [P, E]
        tiles = tiles_for(ids.numel(), num_experts, hidden.device)
        routing = route_rows(ids.view(-1), num_experts, tiles.block_rows)
        hidden_size, middle_size = self.host.layout.down
        middle = hidden.new_empty(ids.numel(), middle_size)
        rows = hidden.new_empty(ids.numel(), hidden_size)
        for number in range(len(up)):
            if copies:
                self._fetch_pass(copies, number, hidden)
            gated_up(hidden, routing, up[number], middle, top_k=top_k, tiles=tiles)
            weighted_down(middle, routing, down[number], weights, rows, tiles=tiles)
        out = torch.empty_like(hidden)
        sum_rows(rows, ids, out, num_experts=num_experts)
        return out

    def _addresses_of_passes(self, num_passes: int) -> torch.Tensor:
        """`[2, P, P * S + 1]`: up and down addresses in each pass, by what `SlotTable.plan` says.

        Made once, before a step of so many passes is recorded.
        """
        if num_passes not in self._addresses:
            num_slots = self.table.num_slots
            table = torch.zeros(
                2,
                num_passes,
                num_passes * num_slots + 1,
                dtype=torch.int64,
                device=self._streamed.device,
            )
            for number in range(num_passes):
                table[:, number, number * num_slots : (number + 1) * num_slots] = (
                    self.slots.addresses()
                )
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

    def _plan_step(
        self, ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """`SlotTable.plan`: where experts are, and by pass which come to which slots."""
        keys, experts, slots = self.table.plan(ids)
        if isinstance(self.host, DiskExperts):
            missing = [expert for expert in experts.flatten().tolist() if expert >= 0]
            self._expect(self.host, missing, len(ids))
        if self._prefetch is not None:
            self._prefetch.join()
        return keys, list(zip(experts, slots, strict=True))

    def _fetch_pass(
        self,
        copies: list[tuple[torch.Tensor, torch.Tensor]],
        number: int,
        hidden: torch.Tensor,
    ) -> None:
        self._fetch(*copies[number])
        if number == len(copies) - 1:  # the link is idle from here on
            self._look_ahead(hidden)

    def _product(
        self,
        layer: Experts,
        name: str,
        rows: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        weight = weight if self._is_transposed else weight.transpose(1, 2)  # [G, in, out]
        out: torch.Tensor = functional.grouped_mm(rows, weight, offs=ends)
        if layer.has_bias:
            out = out + getattr(layer, f"{name}_bias")[ids.clamp(max=layer.num_experts - 1)]
        return out

    def _look_ahead(self, hidden: torch.Tensor) -> None:
        """Start to copy what the next layer is likely to need."""
        if self._prefetch is None or self.next is None:
            return
        ids = self._prefetch.predict(self._index + 1, hidden)
        self._prefetch.start(self.next.table.prefetch(ids, self._prefetch.most), self.next._fetch)

    def _fill(self) -> None:
        """Bring the experts that have slots at first."""
        self.table.reset()
        first = torch.arange(self.table.num_active, device=self._streamed.device)
        if isinstance(self.host, DiskExperts):
            self._expect(self.host, first.tolist(), 0)
        self._fetch(first, first)
        self._is_filled = True

    def _expect(self, disk: DiskExperts, missing: list[int], num_ids: int) -> None:
        """Start to read experts from disk, in the order of use.

        A step of so many ids that it needs most experts of any layer reads ahead those that the
        next layer lacks.
        """
        ahead: list[tuple[int, int]] = []
        following, num_experts = self.next, self.table.num_experts
        num_tokens = num_ids // max(1, self.top_k)
        if (
            following is not None
            and reach(self.top_k / num_experts, num_tokens) >= _READ_AHEAD_FROM
        ):
            assert isinstance(following.host, DiskExperts)
            absent = (following.table.slots() < 0).nonzero().flatten().tolist()
            ahead = [(following.host.layer, expert) for expert in absent]
        disk.store.expect(disk.layer, missing, ahead)

    def _fetch_from_disk(self, disk: DiskExperts, experts: list[int], slots: list[int]) -> None:
        """Copy experts to slots, as they come to host memory."""

        def submitted() -> torch.cuda.Event | None:
            if self._streamed.device.type != "cuda":
                return None
            event = torch.cuda.Event()
            event.record()
            return event

        for expert, slot in zip(experts, slots, strict=True):
            if expert >= 0:
                with disk.store.take(disk.layer, expert, until=submitted) as payload:
                    source = StoredExperts(disk.layout, None, payload.unsqueeze(0))
                    self.slots.put(source, slot, is_transposed=self._is_transposed)

    def _fetch(self, experts: torch.Tensor, slots: torch.Tensor) -> None:
        if isinstance(self.host, DiskExperts):
            self._fetch_from_disk(self.host, experts.tolist(), slots.tolist())
            return
        self.slots.fetch(self.host, experts, slots, is_transposed=self._is_transposed)
