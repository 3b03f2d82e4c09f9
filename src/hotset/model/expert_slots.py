"""Places for experts on the device: slots that keep them, and buffers that they pass through."""

from typing import Any

import torch
from torch.nn import functional

from hotset.memory.expert_cache import ExpertLayout, HostExperts, SlotTable
from hotset.model.cpu_linear import PackedLinear
from hotset.model.experts import pack_matrix


class Slots:
    """Places for experts of one layer on the device.

    On the CPU float32 experts are packed as they come, as `pack_experts` does with those that stay:
    the same values come out of the same products.

    Attributes:
        payloads: `[N, payload_bytes]` uint8; None where they are packed.
        up: `[N, *layout.up]` view of it; down: likewise.
    """

    def __init__(
        self, num_slots: int, layout: ExpertLayout, device: torch.device, *, packed: bool
    ) -> None:
        self._packed: list[tuple[PackedLinear, PackedLinear] | None] = []
        self.payloads: torch.Tensor | None = None
        if packed:
            self._packed = [None] * num_slots
        else:
            self.payloads = torch.zeros(
                num_slots, layout.payload_bytes, dtype=torch.uint8, device=device
            )
            self.up, self.down = layout.views(self.payloads)

    def put(self, host: HostExperts, expert: int, slot: int, *, is_transposed: bool) -> None:
        """Copy one expert; where it is to be packed, pack it."""
        if self.payloads is not None:
            self.payloads[slot].copy_(host.payloads[expert], non_blocking=True)
            return
        self._packed[slot] = None  # its memory is free before the other's is taken
        up, down = host.up[expert], host.down[expert]
        if is_transposed:
            up, down = up.t(), down.t()
        self._packed[slot] = (pack_matrix(up), pack_matrix(down))

    def fetch(
        self,
        host: HostExperts,
        experts: torch.Tensor,
        slots: torch.Tensor,
        *,
        is_transposed: bool,
        beside_compute: bool = False,
    ) -> None:
        """Copy `experts`, `[N]` and -1 for none, to `slots`; on a GPU the device reads both lists.

        With `beside_compute` it leaves most processors to what runs at the same time.
        """
        if self.payloads is not None and self.payloads.device.type == "cuda":
            from hotset.kernels.copy_experts import copy_experts

            copy_experts(
                host.payloads, self.payloads, experts, slots, beside_compute=beside_compute
            )
            return
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            if expert >= 0:
                self.put(host, expert, slot, is_transposed=is_transposed)

    def product(self, which: int, slot: int, rows: torch.Tensor, is_transposed: bool) -> Any:
        """`[R, in]` to `[R, out]` by the up (0) or down (1) product of one expert."""
        if self.payloads is None:
            packed = self._packed[slot]
            assert packed is not None, "an expert is used that is not there"
            return packed[which](rows)
        weight = (self.up, self.down)[which][slot]
        return functional.linear(rows, weight.t() if is_transposed else weight)


class Staging:
    """Two staging buffers: while a layer reads one, the next layer's experts go to the other.

    What comes are the experts that have no slot. Where those are always the same, so that they are
    adjacent, the copy engine brings them; else the device reads them itself. On a GPU that is on a
    stream of its own, which forks from the stream that computes and joins it again, so that a CUDA
    graph can record both.

    Args:
        hosts: of each layer, in the order in which a step runs them.
        tables: likewise.
        transposed: whether weights are, by layer.
    """

    def __init__(
        self,
        hosts: list[HostExperts],
        tables: list[SlotTable],
        transposed: list[bool],
        device: torch.device,
        *,
        packed: bool,
    ) -> None:
        self._hosts, self._tables, self._transposed = hosts, tables, transposed
        table = tables[0]
        self._num_slots = table.num_slots
        num_staged = table.num_experts - table.num_slots
        self._is_fixed = table.num_fixed == table.num_slots
        self._buffers = [Slots(num_staged, hosts[0].layout, device, packed=packed) for _ in "ab"]
        self._order = torch.arange(num_staged, device=device)
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
        self._ahead = None
        if layer + 1 < len(self._hosts):
            self._start(layer + 1)
        return self._buffers[layer % 2], self._lists[layer % 2][1]

    def join(self) -> None:
        """Have what is computed from here on wait for the copies started so far.

        To be called before the end of a recording, too.
        """
        if self._ahead is not None and self._stream is not None and not self._is_joined:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_joined = True

    def _start(self, layer: int) -> None:
        buffer, host = self._buffers[layer % 2], self._hosts[layer]
        self._ahead, self._is_joined = layer, False
        if not self._is_fixed:
            self._lists[layer % 2] = self._tables[layer].absent()
        experts, _ = self._lists[layer % 2]
        if self._stream is None:
            buffer.fetch(host, experts, self._order, is_transposed=self._transposed[layer])
            return
        # The layer that read this buffer last was submitted before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if self._is_fixed:
                assert buffer.payloads is not None
                buffer.payloads.copy_(host.payloads[self._num_slots :], non_blocking=True)
            else:
                buffer.fetch(
                    host,
                    experts,
                    self._order,
                    is_transposed=self._transposed[layer],
                    beside_compute=True,
                )
