"""One step's tokens as flat arrays, and their way to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotset.sequence import StepItem

Array = npt.NDArray[Any]

# Rows of `Batch.inputs`.
_TOKEN, _POSITION, _BLOCK, _OFFSET, _SOURCE = range(5)


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One request's part of a step: tokens `[start, start + num_tokens)` of the flat batch."""

    start: int
    num_tokens: int
    context_len: int  # with the tokens of this step
    block_table: Sequence[int]


class Inputs(NamedTuple):
    """A step's tokens on the device, each `[T]` int64.

    Attributes:
        blocks: where the token's KV goes, with its place in the block in `offsets`.
        sources: row among the tokens that the step before chose, for the tokens that the host
            does not know yet; -1 for the others.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    sources: torch.Tensor

    def resolve(self, previous: torch.Tensor) -> torch.Tensor:
        """`token_ids` with the tokens that the step before chose (`previous`, `[R]`) filled in."""
        chosen = previous[self.sources.clamp(min=0)]
        return torch.where(self.sources >= 0, chosen, self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """A step in flat order: sequences of one token first, as other kernels attend those.

    Attributes:
        inputs: `[5, T]` int64, the rows of `Inputs`.
        sampled_rows: `[R]`, the last row of each item that samples, in the order of the plan.
        scored_rows: `[P]`, the rows of each item's `scored` tokens, in the order of the plan.
        sequences: one for each item, in flat order.
        num_decodes: how many leading sequences have one token.
        has_unknown: whether any token is still being chosen on the device.
    """

    inputs: Array
    sampled_rows: Array
    scored_rows: Array
    sequences: list[SequenceSpan]
    num_decodes: int
    has_unknown: bool

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.inputs.shape[1])

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one token, and all of them sample."""
        return self.num_decodes == len(self.sequences) == len(self.sampled_rows)

    def to(self, device: torch.device) -> tuple[Inputs, torch.Tensor]:
        """`Inputs` on `device`, and `sampled_rows` and `scored_rows` as one, by one copy.

        Nobody waits for it.
        """
        packed = np.concatenate([self.inputs.ravel(), self.sampled_rows, self.scored_rows])
        on_device = to_device(packed, device)
        size = self.inputs.size
        return Inputs(*on_device[:size].view(5, -1).unbind()), on_device[size:]


def make_batch(items: Sequence[StepItem], block_size: int) -> Batch:
    """Flatten the items of a plan."""
    ordered = sorted(items, key=lambda item: item.num_tokens > 1)  # stable: decodes first
    columns: list[tuple[int, int, int, int, int]] = []
    chunks: list[Array] = []
    sequences: list[SequenceSpan] = []
    last_row: dict[int, int] = {}
    scored: dict[int, Array] = {}
    start = 0
    for item in ordered:
        request, table = item.request, item.request.kv.block_table
        end = item.start + item.num_tokens
        source = -1 if request.pending_row is None else request.pending_row
        if item.num_tokens == 1:
            place = item.start
            source = source if end == request.num_tokens else -1
            block, offset = divmod(place, block_size)
            columns.append((request.token_ids[place], place, table[block], offset, source))
        else:
            chunk = np.full((5, item.num_tokens), -1, np.int64)
            chunk[_TOKEN] = request.token_ids[item.start : end]
            chunk[_POSITION] = positions = np.arange(item.start, end)
            first_block = item.start // block_size
            blocks = np.array(table[first_block : -(-end // block_size)])
            chunk[_BLOCK] = blocks[positions // block_size - first_block]
            chunk[_OFFSET] = positions % block_size
            if end == request.num_tokens:
                chunk[_SOURCE, -1] = source
            chunks.append(chunk)
        sequences.append(SequenceSpan(start, item.num_tokens, end, table))
        start += item.num_tokens
        if item.samples:
            last_row[id(item)] = start - 1
        if positions_scored := item.scored:
            scored[id(item)] = np.array(positions_scored) - end + start
    decodes = np.array(columns, np.int64).reshape(-1, 5).T
    inputs = np.concatenate([decodes, *chunks], axis=1)
    has_unknown = bool((inputs[_SOURCE] >= 0).any())
    # The placeholder of a token that is still being chosen is no index of an embedding.
    inputs[_TOKEN, inputs[_SOURCE] >= 0] = 0
    return Batch(
        inputs,
        np.array([last_row[id(item)] for item in items if item.samples], np.int64),
        np.concatenate(
            [np.empty(0, np.int64), *(scored[id(item)] for item in items if id(item) in scored)]
        ),
        sequences,
        len(columns),
        has_unknown,
    )


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
