"""Device and host memory for KV blocks: one contiguous run of bytes for each block or slot."""

import contextlib
import mmap
import threading
from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np
import torch

from hotset.cost.cache_spec import KEYS_ALONE, KeysValues, StoredSpec, groups_of, index_key_bytes
from hotset.memory.disk.slab import slot_bytes_for


class DeviceArena:
    """The device pool, block-major: a block is one contiguous run over all layers.

    With index keys a block is two runs: those keys of all blocks come first, then all latents,
    which so are rows of one width throughout. The index keys go on through the memory of latents:
    rows there can give way to index keys of other blocks. See `kv.index_blocks`.

    A block has the layers one after another, of each the keys of its tokens, then the values, or
    the latents of its tokens: for equal layers the pool is
    `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`, or
    `[num_blocks, num_layers, block_size, rank + rope_dim]`. Layers that share a selection have
    their latents of a token side by side, so that these come from host memory as one run: in a
    block such a group is `[block_size, layers of the group, rank + rope_dim]`.

    Args:
        specs: what each layer caches, as `CacheSpec.stored`: keys and values of one width.
        num_blocks: in the pool.
        block_size: tokens of a block.
        dtype: of the stored values.
        device: where they are.
        scales: for each layer, what its stored keys and its stored values have to be multiplied
            with; None is 1.
        memory: uint8 on `device`, as long as the pool, to use; None is zeros of its own. Part of it
            may be lent where a block is one run.
        index_dims: for each layer, the width of the key of its indexer; None is 0 for all.
        index_dtype: of these keys, `dtype` or float8_e4m3fn; None is `dtype`.

    Attributes:
        layers: of each layer, `[num_blocks, 2, block_size, num_kv_heads, head_dim]`; of one that
            caches latents, `[num_blocks, block_size, rank + rope_dim]`, the latent first. Other
            strides than those of the last dimension may be of any size.
        groups: layers that share a selection, the one that selects first; see `groups_of`.
        index_keys: of each layer, `[num_blocks or more, block_size, index dim]`; beyond the blocks
            is what lies in the memory of latents. Empty where no layer has any.
        index_scales: of each layer, `[num_blocks or more, block_size]` float32, what the numbers of
            an 8-bit index key have to be multiplied with; None where keys are not of 8 bits. They
            come after the layer's keys in a block. Empty where no layer has keys.
        memory: uint8, all of the pool, for those who copy blocks by `runs`.
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
        index_dims: Sequence[int] | None = None,
        index_dtype: torch.dtype | None = None,
    ) -> None:
        index_dims, index_dtype = index_dims or [0] * len(specs), index_dtype or dtype
        num_values = block_size * sum(spec.token_values for spec in specs)
        key_bytes = [index_key_bytes(dim, index_dtype.itemsize) for dim in index_dims]
        index_bytes = [block_size * each for each in key_bytes]
        self.block_bytes = num_values * dtype.itemsize + sum(index_bytes)
        # Zeros: attention may read slots of a block that were never written, under a mask, and
        # 0 * NaN would still be NaN.
        if memory is None:
            memory = torch.zeros(num_blocks * self.block_bytes, dtype=torch.uint8, device=device)
        self.memory = memory
        values = memory[num_blocks * sum(index_bytes) :].view(dtype)
        self.storage = values.view(num_blocks, num_values)
        self._parts = [self.storage]
        self.index_keys: list[torch.Tensor] = []
        self.index_scales: list[torch.Tensor | None] = []
        if any(index_bytes):
            count = len(memory) // sum(index_bytes)
            keys = memory[: count * sum(index_bytes)].view(count, sum(index_bytes))
            self._parts.append(keys.view(dtype))
            for part, dim in zip(keys.split(index_bytes, dim=1), index_dims, strict=True):
                own, own_scales = _keys_and_scales(part, (count, block_size, dim), index_dtype)
                self.index_keys.append(own)
                self.index_scales.append(own_scales)
        sizes = [part[0].nbytes for part in self._parts]
        ends = accumulate(sizes)
        self._runs = [
            (part.data_ptr(), end - size, size)
            for part, size, end in zip(self._parts, sizes, ends, strict=True)
        ]
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scales = [(1.0, 1.0)] * len(specs) if scales is None else list(scales)
        self.groups = groups_of([dim > 0 for dim in index_dims])
        self.layers: list[torch.Tensor] = []
        start = 0
        for group in self.groups:
            spec, count = specs[group.start], len(group)
            end = start + block_size * count * spec.token_values
            part = self.storage[:, start:end]
            if isinstance(spec, KeysValues):
                shape = (num_blocks, 2, block_size, spec.num_kv_heads, spec.key_dim)
                self.layers.append(part.view(shape))
            else:
                assert all(specs[layer] == spec for layer in group)
                self.layers += part.view(num_blocks, block_size, count, -1).unbind(2)
            start = end

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) within the pool, in order; to index blocks the index keys alone.

        Nobody waits for it.
        """
        for keys_alone, group in groupby(copies, lambda copy: copy[1] & KEYS_ALONE):
            if not keys_alone:
                for source, target in group:
                    for part in self._parts:
                        part[target].copy_(part[source])
            else:
                pairs = torch.tensor([(source, target ^ KEYS_ALONE) for source, target in group])
                if self.storage.is_cuda:
                    pairs = pairs.pin_memory().to(self.storage.device, non_blocking=True)
                _, keys = self._parts
                keys[pairs[:, 1]] = keys[pairs[:, 0]]

    def clear_blocks(self, first: int, end: int) -> None:
        """Zeros for blocks from `first` to before `end`, for the reason above."""
        for part in self._parts:
            part[first:end].view(torch.uint8).zero_()

    def runs(self, block: int) -> list[tuple[int, int, int]]:
        """The `(address, place in its payload, bytes)` of a block's content.

        Of an index block that is the index keys alone.
        """
        runs = self._runs[1:] if block & KEYS_ALONE else self._runs
        number = block & ~KEYS_ALONE
        return [(start + number * size, place, size) for start, place, size in runs]


def _keys_and_scales(
    part: torch.Tensor, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The index keys of a layer in `[num_blocks, bytes]` uint8, and what comes after them."""
    _, block_size, dim = shape
    size = block_size * dim * dtype.itemsize
    keys = part[:, :size].view(dtype).view(shape)
    return keys, part[:, size:].view(torch.float32) if part.shape[1] > size else None


def row_steps(cache: torch.Tensor) -> tuple[int, int]:
    """How rows of latents are numbered, from a layer's first on.

    Args:
        cache: one of `DeviceArena.layers`, `[num_blocks, block_size, rank + rope_dim]`.

    Returns:
        Rows of all layers from one block to the next, and from one token to the next in a block.
    """
    block_stride, token_stride, _ = cache.stride()
    width = cache.shape[-1]
    assert block_stride % width == 0 and token_stride % width == 0, "a block is no number of rows"
    return block_stride // width, token_stride // width


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
