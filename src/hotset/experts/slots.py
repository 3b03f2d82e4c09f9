"""Places for experts on the device: slots that keep them, and buffers that they pass through."""

from typing import Any

import torch
from torch.nn import functional

from hotset.experts.gating import pack_matrix
from hotset.experts.host import ExpertLayout, HostExperts, StoredExperts
from hotset.experts.residency import SlotTable
from hotset.linear.packed import PackedLinear


class Slots:
    """Places for experts of one layer on the device.

    On the CPU float32 experts are packed as they come, as `pack_experts` does with those that stay:
    the same values come out of the same products.

    Args:
        memory: `[N, payload_bytes]` uint8 zeros to use, its rows contiguous; None for its own.

    Attributes:
        payloads: `[N, payload_bytes]` uint8; None where they are packed.
        up: `[N, *layout.up]` view of it; down: likewise.
    """

    def __init__(
        self,
        num_slots: int,
        layout: ExpertLayout,
        device: torch.device,
        *,
        packed: bool,
        memory: torch.Tensor | None = None,
    ) -> None:
        self._packed: list[tuple[PackedLinear, PackedLinear] | None] = []
        self.payloads: torch.Tensor | None = None
        if packed:
            self._packed = [None] * num_slots
        else:
            if memory is None:
                size = (num_slots, layout.payload_bytes)
                memory = torch.zeros(size, dtype=torch.uint8, device=device)
            self.payloads = memory
            self.up, self.down = layout.views(memory)

    def fetch(
        self,
        source: StoredExperts,
        experts: torch.Tensor,
        slots: torch.Tensor,
        *,
        is_transposed: bool,
        beside_compute: bool = False,
    ) -> None:
        """Copy `experts`, `[N]` and -1 for none, to `slots`; on a GPU the device reads both lists.

        There `source` is on the device, or pinned. With `beside_compute` the copy leaves most
        processors to what runs at the same time.
        """
        if self.payloads is not None and self.payloads.device.type == "cuda":
            from hotset.kernels.copy_experts import copy_experts
            from hotset.kernels.dequantise_experts import dequantise_experts

            if source.narrow is None:
                copy_experts(
                    source.payloads, self.payloads, experts, slots, beside_compute=beside_compute
                )
            else:
                dequantise_experts(
                    source.narrow,
                    source.payloads,
                    self.payloads.view(source.layout.dtype),
                    experts,
                    slots,
                    beside_compute=beside_compute,
                )
            return
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            if expert >= 0:
                self._put(source, expert, slot, is_transposed=is_transposed)

    def put(self, source: StoredExperts, slot: int, *, is_transposed: bool) -> None:
        """Copy the only expert of `source`, which is in host memory, to a slot."""
        if self.payloads is not None and source.narrow is None:
            self.payloads[slot].copy_(source.payloads[0], non_blocking=True)
        else:
            self._put(source, 0, slot, is_transposed=is_transposed)

    def drop(self, first: int) -> None:
        """Free packed experts from place `first` on; nobody needs them. Others share memory."""
        self._packed[first:] = [None] * len(self._packed[first:])

    def addresses(self) -> torch.Tensor:
        """`[2, N]` int64 on the device: where the up and the down matrix of each place begin."""
        assert self.payloads is not None
        first = [matrices.data_ptr() for matrices in (self.up, self.down)]
        steps = torch.arange(len(self.payloads), device=self.payloads.device)
        return torch.stack([steps * self.payloads.stride(0) + address for address in first])

    def product(self, which: int, slot: int, rows: torch.Tensor, is_transposed: bool) -> Any:
        """`[R, in]` to `[R, out]` by the up (0) or down (1) product of one expert."""
        if self.payloads is None:
            packed = self._packed[slot]
            assert packed is not None, "an expert is used that is not there"
            return packed[which](rows)
        weight = (self.up, self.down)[which][slot]
        return functional.linear(rows, weight.t() if is_transposed else weight)

    def _put(self, source: StoredExperts, expert: int, slot: int, *, is_transposed: bool) -> None:
        """Copy one expert; where it is to be packed, pack it."""
        (up,), (down,) = source.matrices(slice(expert, expert + 1))
        if self.payloads is not None:
            self.up[slot], self.down[slot] = up, down
            return
        self._packed[slot] = None  # its memory is free before the other's is taken
        if is_transposed:
            up, down = up.t(), down.t()
        self._packed[slot] = (pack_matrix(up), pack_matrix(down))


class Staging:
    """Two staging buffers: while a layer reads one, the next layer's experts go to the other.

    What comes are the experts that have no slot. Where those are always the same, so that they are
    adjacent, the copy engine brings them as they are stored, and a layer widens what has fewer
    bits; else the device reads and widens them itself. On a GPU that is on a stream of its own,
    which forks from the stream that computes and joins it again, so that a CUDA graph can record
    both.

    Args:
        hosts: of each layer, in the order in which a step runs them.
        tables: likewise.
        transposed: whether weights are, by layer.
        is_fixed: whether the slots always hold the experts of the same number.
    """

    def __init__(
        self,
        hosts: list[HostExperts],
        tables: list[SlotTable],
        transposed: list[bool],
        device: torch.device,
        *,
        is_fixed: bool,
        packed: bool,
    ) -> None:
        self._hosts, self._tables, self._transposed = hosts, tables, transposed
        table, host = tables[0], hosts[0]
        self._num_slots = table.num_slots
        self._num_staged = table.most_absent
        self._is_fixed = is_fixed
        self._order = torch.arange(self._num_staged, device=device)

        def make_slots() -> Slots:
            return Slots(self._num_staged, host.layout, device, packed=packed)

        self._narrow: list[StoredExperts] = []
        if self._is_fixed and host.narrow is not None:
            size = (self._num_staged, host.payload_bytes)
            self._narrow = [
                StoredExperts(
                    host.layout, host.narrow, torch.zeros(size, dtype=torch.uint8, device=device)
                )
                for _ in range(2)
            ]
            self._buffers = [make_slots()] * 2
        else:
            self._buffers = [make_slots(), make_slots()]
        # By buffer: experts and places, see `SlotTable.absent`. Kept, as the other stream reads
        # them.
        self._lists = [table.absent()] * 2
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: int | None = None  # the layer that is on its way
        self._is_joined = False

    def take(self, layer: int) -> tuple[Slots, torch.Tensor]:
        """The experts of `layer` that have no slot; starts to fill the other buffer for the next.

        Returns:
            the buffer, and the places of all experts as by `SlotTable.absent`.
        """
        if self._ahead != layer:
            self._start(layer)
        self.join()
        buffer, (_, places) = self._buffers[layer % 2], self._lists[layer % 2]
        self._ahead = None
        if layer + 1 < len(self._hosts):
            self._start(layer + 1)
        if self._narrow:
            self._fetch(layer, self._narrow[layer % 2], self._order)
        return buffer, places

    def join(self) -> None:
        """Have what is computed from here on wait for the copies started so far.

        To be called before the end of a recording, too.
        """
        if self._ahead is not None and self._stream is not None and not self._is_joined:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_joined = True

    def _start(self, layer: int) -> None:
        self._ahead, self._is_joined = layer, False
        if not self._is_fixed:
            self._lists[layer % 2] = self._tables[layer].absent()
        if self._stream is None:
            self._copy(layer)
            return
        # The layer that read this buffer last was submitted before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(layer)

    def _copy(self, layer: int) -> None:
        host, buffer = self._hosts[layer], self._buffers[layer % 2]
        target = self._narrow[layer % 2].payloads if self._narrow else buffer.payloads
        if self._is_fixed and target is not None:
            target.copy_(host.payloads[self._num_slots :], non_blocking=True)
        else:
            experts, _ = self._lists[layer % 2]
            self._fetch(layer, host, experts, beside_compute=True)

    def _fetch(
        self,
        layer: int,
        source: StoredExperts,
        experts: torch.Tensor,
        *,
        beside_compute: bool = False,
    ) -> None:
        self._buffers[layer % 2].fetch(
            source,
            experts,
            self._order,
            is_transposed=self._transposed[layer],
            beside_compute=beside_compute,
        )
