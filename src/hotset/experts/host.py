"""Experts as rows of bytes, and the only copy in host memory of those of a layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from hotset.errors import ConfigError
from hotset.experts.narrow import NarrowLayout, RoundingError, quantise_into
from hotset.memory.arena import HostArena
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.pin import pin, unpin_with

if TYPE_CHECKING:
    from hotset.experts.slots import Slots

_COMMIT_THREADS = 8
_MOVED_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One expert as a run of bytes: its up product (gate and up), then its down product.

    Attributes:
        up: shape of the first matrix.
        down: shape of the second.
        is_transposed: whether a weight is `[in, out]`, not `[out, in]`.
    """

    up: tuple[int, int]
    down: tuple[int, int]
    dtype: torch.dtype
    is_transposed: bool = False

    @classmethod
    def of_narrow(cls, narrow: NarrowLayout, dtype: torch.dtype) -> "ExpertLayout":
        """What a checkpoint's narrow experts are computed as: `[out, in]`, as all are stored."""
        up, down = ((math.prod(m.shape[:-1]), m.shape[-1]) for m in narrow.matrices)
        return cls(up, down, dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the two matrices."""
        return (math.prod(self.up) + math.prod(self.down)) * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes from one expert to the next: whole pages."""
        return slot_bytes_for(self.weight_bytes)

    def views(self, payloads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N, payload_bytes]` uint8 as `[N, *up]` and `[N, *down]`, of the same memory."""
        values = payloads.view(self.dtype)
        split = math.prod(self.up)
        end = split + math.prod(self.down)
        return (
            values[:, :split].unflatten(1, self.up),
            values[:, split:end].unflatten(1, self.down),
        )


class StoredExperts:
    """Experts as rows of bytes, as they are computed with or in fewer bits.

    Attributes:
        layout: as they are computed with.
        narrow: None where they are stored like that.
        payloads: `[E, payload_bytes]` uint8, on any device.
    """

    def __init__(
        self, layout: ExpertLayout, narrow: NarrowLayout | None, payloads: torch.Tensor
    ) -> None:
        self.layout, self.narrow, self.payloads = layout, narrow, payloads

    @property
    def payload_bytes(self) -> int:
        """Bytes from one expert to the next."""
        return self.payloads.shape[1]

    def matrices(self, experts: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N, *layout.up]` and `[N, *layout.down]`: views, or copies of what is narrow."""
        payloads = self.payloads[experts]
        if self.narrow is None:
            return self.layout.views(payloads)
        up, down = self.narrow.dequantise(payloads, self.layout.dtype)
        return up, down


class HostRows:
    """Rows of bytes in host memory, one expert in each, which a GPU can read while they are pinned.

    Attributes:
        arena: has the memory.
        payloads: `[num_rows, bytes of a row]` uint8, views of it.
    """

    def __init__(self, num_rows: int, row_bytes: int) -> None:
        self.arena = HostArena(num_slots=num_rows, block_bytes=row_bytes)
        self.arena.use_huge_pages()
        self.payloads = torch.from_numpy(self.arena.slots)
        self._unpin: Callable[[], object] | None = None

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return int(self.payloads.nbytes)

    def pin(self) -> None:
        """Pin the memory, which is unpinned with this object at the latest.

        Raises:
            ConfigError: it cannot be pinned; it stays as it is.
        """
        if self._unpin is not None:
            return
        address = self.payloads.data_ptr()
        if code := pin(address, self.num_bytes):
            raise ConfigError(
                f"{self.num_bytes / 2**30:.2f} GiB of host memory for experts cannot be pinned "
                f"(CUDA error {code}); raise the limit on locked memory, or keep more experts on "
                "the device"
            )
        self._unpin = unpin_with(self, address)

    def unpin(self) -> None:
        """Unpin the memory. Nothing may read it from the device any more."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


# Ids of experts of one layer, and (source, id) of experts of later ones; asked for where needed.
Ids: TypeAlias = Callable[[], list[int]]
Ahead: TypeAlias = Callable[[], list[tuple["ColdSource", int]]]


class ColdSource(Protocol):
    """Where all experts of a layer are, those without a slot too: host memory, or disk below it.

    Attributes:
        layout: of an expert as it is computed with.
        narrow: None where they are stored like that.
        rows: the host memory, of this layer or of all.
    """

    layout: ExpertLayout
    narrow: NarrowLayout | None
    rows: HostRows

    @property
    def payload_bytes(self) -> int:
        """Bytes of an expert as it is stored."""
        ...

    def expect(self, experts: Ids, ahead: Ahead) -> None:
        """Take note of what is fetched next, in this order: experts, then some of later layers."""
        ...

    def fetch(self, slots: "Slots", experts: torch.Tensor, places: torch.Tensor) -> None:
        """Copy `experts`, `[N]` on the device and -1 for none, to the slots `places`, `[N]`."""
        ...


class HostExperts(StoredExperts):
    """The only copy in host memory of the experts of one layer.

    Args:
        pinned: whether to pin the memory at once, which makes filling it from a GPU faster.

    Attributes:
        rows: the memory.
        rounding: what it lost, where it is narrow.

    Raises:
        ConfigError: it cannot be pinned.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        num_experts: int,
        narrow: NarrowLayout | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        num_bytes = layout.weight_bytes if narrow is None else narrow.payload_bytes
        self.rows = HostRows(num_experts, num_bytes)
        super().__init__(layout, narrow, self.rows.payloads)
        self.rounding = RoundingError()
        if pinned:
            self.rows.arena.commit(0, num_experts, num_threads=_COMMIT_THREADS)
            self.rows.pin()

    def store(self, up: torch.Tensor, down: torch.Tensor, device: torch.device) -> None:
        """Fill it with `[E, *layout.up]` and `[E, *layout.down]`, rounded on `device` if at all."""
        if self.narrow is not None:
            self.rounding = quantise_into(self.narrow, self.payloads, up, down, device)
            return
        # Off a GPU as whole payloads, which is one copy each time: a view of their parts is not.
        num_experts = len(up) if up.device.type == "cpu" else _MOVED_TOGETHER
        for start in range(0, len(up), num_experts):
            part = slice(start, start + num_experts)
            target = self.payloads[part]
            payloads = (
                target if up.device.type == "cpu" else torch.zeros_like(target, device=up.device)
            )
            for view, weight in zip(self.layout.views(payloads), (up, down), strict=True):
                view.copy_(weight[part])
            if payloads is not target:
                target.copy_(payloads)

    def expect(self, experts: Ids, ahead: Ahead) -> None:
        """Nothing: all are there, and the device is not asked."""

    def fetch(self, slots: "Slots", experts: torch.Tensor, places: torch.Tensor) -> None:
        """Copy experts to slots; on a GPU the device reads both lists."""
        slots.fetch(self, experts, places)
