"""Slots on the device: places that keep experts of one layer, or that those of many pass."""

import torch
from torch.nn import functional

from hotset.experts.host import ExpertLayout, StoredExperts
from hotset.experts.narrow import NarrowLayout
from hotset.experts.weights import pack_matrix
from hotset.linear.packed import PackedLinear


class Slots:
    """Places for experts on the device.

    On the CPU float32 experts are packed as they come, as `pack_experts` does with those that stay:
    the same values come out of the same products.

    Args:
        layout: of an expert as it is computed with.
        narrow: how they hold it in fewer bits, for kernels that read those; None where they do not.
        memory: `[N, payload_bytes]` uint8 zeros to use, its rows contiguous; None for its own.

    Attributes:
        payloads: `[N, payload_bytes]` uint8; None where they are packed.
        weights: `[N, *layout.up]` and `[N, *layout.down]`, views of it; None where they are packed
            or narrow.
    """

    def __init__(
        self,
        num_slots: int,
        layout: ExpertLayout,
        device: torch.device,
        *,
        packed: bool,
        narrow: NarrowLayout | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        assert not (packed and narrow)
        self.device, self.layout, self.narrow = device, layout, narrow
        self._packed: list[tuple[PackedLinear, PackedLinear] | None] = []
        self.payloads: torch.Tensor | None = None
        self.weights: tuple[torch.Tensor, torch.Tensor] | None = None
        if packed:
            self._packed = [None] * num_slots
        else:
            if memory is None:
                size = (num_slots, (narrow or layout).payload_bytes)
                memory = torch.zeros(size, dtype=torch.uint8, device=device)
            self.payloads = memory
            self.weights = layout.views(memory) if narrow is None else None

    def fetch(
        self,
        source: StoredExperts,
        experts: torch.Tensor,
        slots: torch.Tensor,
        *,
        beside_compute: bool = False,
    ) -> None:
        """Copy `experts`, `[N]` and -1 for none, to `slots`; on a GPU the device reads both lists.

        There `source` is on the device, or pinned. With `beside_compute` the copy leaves most
        processors to what runs at the same time.
        """
        if self.payloads is not None and self.payloads.device.type == "cuda":
            from hotset.kernels.copy_experts import copy_experts
            from hotset.kernels.dequantise_experts import dequantise_experts

            if self.has_form_of(source):
                copy_experts(
                    source.payloads, self.payloads, experts, slots, beside_compute=beside_compute
                )
            else:
                assert source.narrow is not None
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
                self._put(source, expert, slot)

    def put(self, source: StoredExperts, slot: int) -> None:
        """Copy the only expert of `source`, which is in host memory, to a slot."""
        if self.payloads is not None and self.has_form_of(source):
            self.payloads[slot].copy_(source.payloads[0], non_blocking=True)
        else:
            self._put(source, 0, slot)

    def drop(self, first: int) -> None:
        """Free packed experts from place `first` on; they are not needed. Others share memory."""
        self._packed[first:] = [None] * len(self._packed[first:])

    def has_form_of(self, source: StoredExperts) -> bool:
        """Whether they hold experts as `source` has them, so that bytes are copied as they are."""
        return (source.narrow is None) == (self.narrow is None)

    def addresses(self) -> torch.Tensor:
        """`[2, N]` int64 on the device: where the up and the down matrix of each place begin.

        Of narrow ones both are where the payload begins.
        """
        assert self.payloads is not None
        matrices = (self.payloads, self.payloads) if self.weights is None else self.weights
        first = [each.data_ptr() for each in matrices]
        steps = torch.arange(len(self.payloads), device=self.payloads.device)
        return torch.stack([steps * self.payloads.stride(0) + address for address in first])

    def product(self, which: int, slot: int, rows: torch.Tensor) -> torch.Tensor:
        """`[R, in]` to `[R, out]` by the up (0) or down (1) product of one expert."""
        out: torch.Tensor
        if self.weights is None:
            packed = self._packed[slot]
            assert packed is not None, "an expert is used that is not there"
            out = packed[which](rows)
            return out
        weight = self.weights[which][slot]
        return functional.linear(rows, weight.t() if self.layout.is_transposed else weight)

    def _put(self, source: StoredExperts, expert: int, slot: int) -> None:
        """Copy one expert; where it is to be packed, pack it."""
        if self.payloads is not None and self.has_form_of(source):
            self.payloads[slot].copy_(source.payloads[expert])
            return
        (up,), (down,) = source.matrices(slice(expert, expert + 1))
        if self.weights is not None:
            for matrices, matrix in zip(self.weights, (up, down), strict=True):
                matrices[slot] = matrix
            return
        self._packed[slot] = None  # its memory is free before the other's is taken
        if self.layout.is_transposed:
            up, down = up.t(), down.t()
        self._packed[slot] = (pack_matrix(up), pack_matrix(down))
