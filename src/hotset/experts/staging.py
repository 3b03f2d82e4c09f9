"""Buffers on the device that the experts without a slot pass through, layer after layer."""

from collections.abc import Callable

import torch

from hotset.experts.host import HostExperts, StoredExperts
from hotset.experts.residency import SlotTable
from hotset.experts.slots import Slots
from hotset.experts.weights import LayerExperts


class Staging:
    """Two staging buffers: while a layer reads one, the next layer's experts go to the other.

    What comes are the experts that have no slot. Where those are always the same, so that they are
    adjacent, the copy engine brings them as they are stored, and a layer widens what has fewer
    bits; else the device reads and widens them itself. On a GPU that is on a stream of its own,
    which forks from the stream that computes and joins it again, so that a CUDA graph can record
    both.

    Args:
        layers: with experts in host memory, in the order in which a step runs them.
        tables: likewise.
        make_slots: makes a number of slots on the device.
        is_fixed: whether the slots always hold the experts of the same number.
    """

    def __init__(
        self,
        layers: list[LayerExperts],
        tables: list[SlotTable],
        make_slots: Callable[[int], Slots],
        *,
        is_fixed: bool,
    ) -> None:
        self._hosts = [each.source for each in layers if isinstance(each.source, HostExperts)]
        self._tables = tables
        table, host = tables[0], self._hosts[0]
        device = table.state.device
        self._num_slots, num_staged = table.num_slots, table.most_absent
        self._is_fixed = is_fixed
        self._order = torch.arange(num_staged, device=device)
        self._narrow: list[StoredExperts] = []
        self._buffers = [make_slots(num_staged)]
        if is_fixed and not self._buffers[0].has_form_of(host):
            size = (num_staged, host.payload_bytes)
            self._narrow = [
                StoredExperts(
                    host.layout, host.narrow, torch.zeros(size, dtype=torch.uint8, device=device)
                )
                for _ in range(2)
            ]
            self._buffers *= 2
        else:
            self._buffers.append(make_slots(num_staged))
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
            buffer.fetch(self._narrow[layer % 2], self._order, self._order)
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
            buffer.fetch(host, experts, self._order, beside_compute=True)
