"""A step's tokens on the device, and copies to it and from it that nobody waits for."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotset.attention.batch import NUM_INPUTS, Batch

Array = npt.NDArray[Any]


class Inputs(NamedTuple):
    """A step's tokens on the device, each `[T]` int64.

    Attributes:
        blocks: where the token's KV goes, with its place in the block in `offsets`.
        sources: row among the tokens that the step before chose, for the tokens that the host
            does not know yet; -1 for the others.
        seats: row of its request in the tables of hot requests; -1 where it is not hot.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    sources: torch.Tensor
    seats: torch.Tensor

    def resolve(self, previous: torch.Tensor) -> torch.Tensor:
        """`token_ids` with the tokens that the step before chose (`previous`, `[R]`) filled in."""
        chosen = previous[self.sources.clamp(min=0)]
        return torch.where(self.sources >= 0, chosen, self.token_ids)


def copy_batch(batch: Batch, device: torch.device) -> tuple[Inputs, torch.Tensor]:
    """`Inputs` on `device`, and `sampled_rows` and `scored_rows` as one, by one copy.

    Nobody waits for it.
    """
    packed = np.concatenate([batch.inputs.ravel(), batch.sampled_rows, batch.scored_rows])
    on_device = to_device(packed, device)
    size = batch.inputs.size
    return Inputs(*on_device[:size].view(NUM_INPUTS, -1).unbind()), on_device[size:]


class HostCopy:
    """A copy of a tensor on the host, under way; the device does what comes next meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._on_host = tensor
        if tensor.is_cuda:
            self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._on_host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> torch.Tensor:
        """Block until it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._on_host


def to_device(values: Array, device: torch.device) -> torch.Tensor:
    """A copy on `device`, without waiting for it."""
    return _staged(values, device).to(device, non_blocking=True)


def fill(target: torch.Tensor, values: Array) -> None:
    """Overwrite `target` on its device, without waiting for it."""
    target.copy_(_staged(values, target.device), non_blocking=True)


def _staged(values: Array, device: torch.device) -> torch.Tensor:
    """Where a copy to `device` can read `values` from at any time."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory()
