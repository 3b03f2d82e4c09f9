"""The KV of a step's prompts in 16 bits, for attention that takes no 8-bit cache."""

from collections.abc import Callable, Sequence

import torch

from hotset.attention.batch import SequenceSpan
from hotset.attention.flashinfer.limits import most_widened_blocks
from hotset.attention.flashinfer.tables import fits
from hotset.cost.workspace import WIDENED_BYTES
from hotset.memory.arena import DeviceArena


class WidenedKV:
    """Holds the blocks of a step's prompts, of one layer after another.

    FlashInfer's kernel for Hopper takes 8-bit keys and values with 8-bit queries only, which cost
    accuracy; its other kernel is slower. To convert them, exactly, takes little time beside what
    prompts compute.

    Args:
        arena: has the 8-bit cache.
        dtype: of 16 bits.
        num_bytes: of the copy.
        kernel: converts blocks; None is `kernels.widen_kv`.

    Attributes:
        num_blocks: most that it holds.
        places: `[num_blocks]` int32 on the device: where the blocks are, in their order.
    """

    def __init__(
        self,
        arena: DeviceArena,
        dtype: torch.dtype,
        *,
        num_bytes: int = WIDENED_BYTES,
        kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        if kernel is None:  # only what can run it imports Triton
            from hotset.kernels.widen_kv import widen_kv

            kernel = widen_kv
        self._widen_kv = kernel
        self._caches = arena.layers
        self._block_size = arena.block_size
        device = arena.storage.device
        most_values = max(cache[0].numel() for cache in arena.layers)
        self.num_blocks = most_widened_blocks(most_values, dtype.itemsize, num_bytes)
        self._memory = torch.zeros(self.num_blocks * most_values, dtype=dtype, device=device)
        self._block_ids = torch.full((self.num_blocks,), -1, dtype=torch.int32, device=device)
        self.places = torch.arange(self.num_blocks, dtype=torch.int32, device=device)

    def holds(self, sequences: Sequence[SequenceSpan]) -> bool:
        """Whether there is room for all that `sequences` attend to."""
        return fits(sequences, self._block_size, self.num_blocks)

    def plan(self, block_ids: torch.Tensor) -> None:
        """Say which blocks the step's prompts have: int32 on the device, `num_blocks` or fewer."""
        self._block_ids[: len(block_ids)].copy_(block_ids)
        self._block_ids[len(block_ids) :].fill_(-1)

    def widen(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert the planned blocks of `layer`.

        Returns:
            Keys and values, each `[num_blocks, block_size, H, D]`; good until the next call.
        """
        cache = self._caches[layer]
        num_values = self.num_blocks * cache[0].numel()
        target = self._memory[:num_values].view(self.num_blocks, *cache.shape[1:])
        self._widen_kv(cache, self._block_ids, target)
        return target[:, 0], target[:, 1]
