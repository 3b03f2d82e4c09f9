"""Places for experts on the device: slots that keep them, and buffers that they pass through."""

from typing import Any

import torch
from torch.nn import functional

from hotset.memory.expert_cache import ExpertLayout, HostExperts
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

    On a GPU the copy engine fills them on a stream of its own, which forks from the stream that
    computes and joins it again, so that a CUDA graph can record both.

    Args:
        hosts: of each layer, in the order in which a step runs them.
        first: the first expert to stage; those before it have slots.
        transposed: whether weights are, by layer.
    """

    def __init__(
        self,
        hosts: list[HostExperts],
        first: int,
        transposed: list[bool],
        device: torch.device,
        *,
        packed: bool,
    ) -> None:
        self._hosts, self._first, self._transposed = hosts, first, transposed
        self._num_staged = len(hosts[0].payloads) - first
        self._buffers = [
            Slots(self._num_staged, hosts[0].layout, device, packed=packed) for _ in range(2)
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: int | None = None  # the layer that is on its way
        self._is_joined = False

    def take(self, layer: int) -> Slots:
        """The buffer with the experts of `layer`; starts to fill the other for the next one."""
        if self._ahead != layer:
            self._start(layer)
        self.join()
        self._ahead = None
        if layer + 1 < len(self._hosts):
            self._start(layer + 1)
        return self._buffers[layer % 2]

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
        if self._stream is None:
            for slot in range(self._num_staged):
                buffer.put(host, self._first + slot, slot, is_transposed=self._transposed[layer])
            return
        assert buffer.payloads is not None
        # The layer that read this buffer last was submitted before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            buffer.payloads.copy_(host.payloads[self._first :], non_blocking=True)
