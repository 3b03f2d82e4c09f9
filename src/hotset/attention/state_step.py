"""Attention and state of a step, by PyTorch's operations or by kernels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from hotset.attention.backend import StepAttention
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.mixers import MixerStep
from hotset.attention.scans import Convolution, Scan
from hotset.attention.sparse.indexer import Index
from hotset.attention.state_tables import TableSizes, chunks_of
from hotset.memory.state_arena import StateArena

if TYPE_CHECKING:
    from hotset.attention.state_kernels import KernelStates


def has_kernels(device: torch.device) -> bool:
    """Whether states are computed by kernels there."""
    return device.type == "cuda"


class StateLayers:
    """Makes the steps of a model whose layers keep keys and values, a state, both or neither.

    Args:
        arena: the slots.
        kv_layers: index of a layer that attends -> which of those it is.
        device: of the arena.
    """

    def __init__(self, arena: StateArena, kv_layers: dict[int, int], device: torch.device) -> None:
        self._arena, self._kv_layers, self._device = arena, kv_layers, device

    def begin_step(self, batch: Batch) -> MixerStep:
        """The states of one step."""
        if not has_kernels(self._device):
            return TorchStates(self._arena, batch, self._device)
        from hotset.attention.state_kernels import KernelStates

        return KernelStates.of_batch(self._arena, batch, self._device)

    def record(self, num_tokens: int, most_seqs: int, *, is_decode: bool) -> "KernelStates":
        """The states of a recorded step of `num_tokens`, decodes alone or any."""
        from hotset.attention.state_kernels import KernelStates

        sizes = TableSizes.of_recorded(num_tokens, most_seqs, is_decode=is_decode)
        return KernelStates.of_padding(self._arena, sizes, self._device)

    def around(self, attention: StepAttention, states: MixerStep) -> "StateStep":
        """All that the layers of a step ask for."""
        return StateStep(attention, self._kv_layers, states)


class StateStep(MixerStep):
    """One step of a model whose layers keep keys and values, a state, both or neither.

    Implements `StepAttention` too.

    Args:
        attention: of the layers that attend.
        kv_layers: index of a layer that attends -> which of those it is.
        states: of the layers that keep a state.
    """

    def __init__(
        self, attention: StepAttention, kv_layers: dict[int, int], states: MixerStep
    ) -> None:
        self._attention, self._kv_layers, self._states = attention, kv_layers, states

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """See `StepAttention`."""
        return self._attention.attend(self._kv_layers[layer], query, key, value, index)

    def convolve(self, layer: int, convolution: Convolution) -> torch.Tensor:
        """See `MixerStep`."""
        return self._states.convolve(layer, convolution)

    def scan(self, layer: int, scan: Scan) -> torch.Tensor:
        """See `MixerStep`."""
        return self._states.scan(layer, scan)

    def finish(self) -> None:
        """See `MixerStep`."""
        self._states.finish()


class TorchStates(MixerStep):
    """On any device, in any dtype. Decodes are computed together, prompts one by one.

    The state of a sequence is read from one slot and written to another or the same, once per
    layer.

    Args:
        arena: the slots.
        batch: the step.
        device: of the arena.
    """

    def __init__(self, arena: StateArena, batch: Batch, device: torch.device) -> None:
        self._arena = arena
        decodes = batch.sequences[: batch.num_decodes]
        self._num_decodes = batch.num_decodes
        self._prompts: Sequence[SequenceSpan] = batch.sequences[batch.num_decodes :]
        self._reads = torch.tensor([s.state_read for s in decodes], device=device)
        self._writes = torch.tensor([s.state_write for s in decodes], device=device)
        kept = [(row, slot) for row, s in enumerate(decodes) for _, slot in s.cuts]
        self._kept = torch.tensor(kept, device=device).T if kept else None

    def convolve(self, layer: int, convolution: Convolution) -> torch.Tensor:
        """See `MixerStep`."""
        values, weight, bias, activation = convolution
        pool, num = self._arena.columns[layer], self._num_decodes
        num_columns = pool.shape[-1]
        output = torch.empty_like(values)

        def run(columns: torch.Tensor) -> torch.Tensor:
            """`[R, C, n]` of `[R, C, n + kernel - 1]`."""
            columns = columns.to(weight.dtype)
            found = functional.conv1d(columns, weight.unsqueeze(1), bias, groups=len(weight))
            return found if activation is None else ACT2FN[activation](found)

        if num:
            columns = torch.cat([pool[self._reads], values[:, :num].T.unsqueeze(-1)], dim=-1)
            output[:, :num] = run(columns).squeeze(-1).T
            self._write(pool, columns[..., 1:])
        for span in self._prompts:
            own = values[:, span.start : span.start + span.num_tokens]
            columns = torch.cat([pool[span.state_read], own], dim=-1)
            output[:, span.start : span.start + span.num_tokens] = run(columns.unsqueeze(0))[0]
            for count, slot in (*span.cuts, (span.num_tokens, span.state_write)):
                pool[slot] = columns[:, count : count + num_columns]
        return output

    def scan(self, layer: int, scan: Scan) -> torch.Tensor:
        """See `MixerStep`."""
        pool, num = self._arena.recurrent[layer], self._num_decodes
        output = scan.new_output()
        if num:
            output[:num], states = scan.decode(num, pool[self._reads])
            self._write(pool, states)
        for span in self._prompts:
            state = pool[span.state_read]
            for start, length, slot in chunks_of(span):
                if length:
                    end = start + length
                    output[start:end], state = scan.chunk(start, end, state)
                if slot >= 0:
                    pool[slot] = state
        return output

    def _write(self, pool: torch.Tensor, states: torch.Tensor) -> None:
        """Write what decodes leave, `[R, ...]`, to their slots and those that keep it."""
        pool[self._writes] = states
        if self._kept is not None:
            pool[self._kept[1]] = states[self._kept[0]]
