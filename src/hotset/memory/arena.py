"""Device and host memory for KV blocks: one contiguous run of bytes for each block or slot."""

import contextlib
import mmap
import threading
from collections.abc import Sequence

import numpy as np
import torch

from hotset.cost.cache_spec import KeysValues, StoredSpec, token_bytes
from hotset.memory.disk.slab import slot_bytes_for


class DeviceArena:
    """The device pool, block-major: a block is one contiguous run over all layers.

    A block has the layers one after another, of each the keys of its tokens, then the values, or
    the latents of its tokens: for equal layers the pool is
    `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`, or
    `[num_blocks, num_layers, block_size, rank + rope_dim]`.

    Args:
        specs: what each layer caches, as `CacheSpec.stored`: keys and values of one width.
        num_blocks: in the pool.
        block_size: tokens of a block.
        dtype: of the stored values.
        device: where they are.
        scales: for each layer, what its stored keys and its stored values have to be multiplied
            with; None is 1.
        memory: uint8 on `device`, as long as the pool, to use; None is zeros of its own.

    Attributes:
        layers: of each layer, `[num_blocks, 2, block_size, num_kv_heads, head_dim]`; of one that
            caches latents, `[num_blocks, block_size, rank + rope_dim]`, the latent first. Other
            strides than those of the last dimension may be of any size.
    """

    def __init__(
        self,
        specs: Sequence[StoredSpec],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[tuple[float, float]] | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        self.block_bytes = block_size * token_bytes(specs, dtype.itemsize)
        num_values = self.block_bytes // dtype.itemsize
        # Zeros: attention may read slots of a block that were never written, under a mask, and
        # 0 * NaN would still be NaN.
        if memory is None:
            self.storage = torch.zeros(num_blocks, num_values, dtype=dtype, device=device)
        else:
            self.storage = memory.view(dtype).view(num_blocks, num_values)
        self._address = self.storage.data_ptr()
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scales = [(1.0, 1.0)] * len(specs) if scales is None else list(scales)
        self.layers: list[torch.Tensor] = []
        start = 0
        for spec in specs:
            end = start + block_size * spec.token_values
            layer = self.storage[:, start:end]
            if isinstance(spec, KeysValues):
                shape = (num_blocks, 2, block_size, spec.num_kv_heads, spec.key_dim)
                self.layers.append(layer.view(shape))
            else:
                self.layers.append(layer.view(num_blocks, block_size, spec.token_values))
            start = end

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to) within the pool."""
        for source, target in copies:
            self.storage[target].copy_(self.storage[source])

    def clear_blocks(self, first: int, end: int) -> None:
        """Zeros for blocks from `first` to before `end`, for the reason above."""
        self.storage[first:end].view(torch.uint8).zero_()

    def runs(self, block: int) -> list[tuple[int, int]]:
        """The `(address, bytes)` of a block."""
        return [(self._address + block * self.block_bytes, self.block_bytes)]

    def bytes_view_tensor(self) -> torch.Tensor:
        """`[num_blocks, block_bytes]` uint8 view of the pool."""
        return self.storage.view(torch.uint8)

    def bytes_view(self) -> np.ndarray:
        """`[num_blocks, block_bytes]` uint8 view of a pool in CPU memory."""
        return self.bytes_view_tensor().numpy()


class HostArena:
    """Page-aligned host memory in slots of `slot_bytes`, a multiple of the page size.

    The operating system commits its pages on first use.
    """

    def __init__(self, *, num_slots: int, block_bytes: int) -> None:
        self.slot_bytes = slot_bytes_for(block_bytes)
        # Private: shared memory would not get huge pages, which make pinning it much faster.
        self._memory = mmap.mmap(
            -1,
            max(1, num_slots) * self.slot_bytes,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        )
        self._view = memoryview(self._memory)
        self.slots = np.frombuffer(self._memory, np.uint8).reshape(-1, self.slot_bytes)
        self._address = int(self.slots.ctypes.data)

    def use_huge_pages(self) -> None:
        """Ask for huge pages, where the operating system has them."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def commit(self, first: int, last: int, *, num_threads: int) -> None:
        """Have the operating system commit the pages of slots `[first, last)`: all zero then.

        It clears each page as it is first touched, which one thread alone makes slow.
        """
        memory = self.slots[first:last].reshape(-1)
        part = -(-len(memory) // num_threads)
        touching = [
            threading.Thread(target=_touch, args=(memory[start : start + part],))
            for start in range(0, len(memory), part)
        ]
        for thread in touching:
            thread.start()
        for thread in touching:
            thread.join()

    def address(self, slot: int) -> int:
        """Where a slot starts."""
        return self._address + slot * self.slot_bytes

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot."""
        return self._view[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]


def _touch(memory: np.ndarray) -> None:
    memory[:: mmap.PAGESIZE] = 0
