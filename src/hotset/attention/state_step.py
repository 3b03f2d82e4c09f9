"""Attention and state of a step, by PyTorch's operations: any device, any dtype."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from hotset.attention.backend import StepAttention
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.scans import GRID, Scan
from hotset.attention.sparse.indexer import Index
from hotset.memory.state_arena import StateArena


class StateStep:
    """One step of a model whose layers keep keys and values, a state, both or neither.

    Implements `StepAttention` and `MixerStep`. The state of a sequence is read from one slot and
    written to another or the same, once per layer. Decodes are computed together, prompts one by
    one.

    Args:
        attention: of the layers that attend.
        kv_layers: index of a layer that attends -> which of those it is.
        arena: the slots.
        batch: the step.
    """

    def __init__(
        self,
        attention: StepAttention,
        kv_layers: dict[int, int],
        arena: StateArena,
        batch: Batch,
        device: torch.device,
    ) -> None:
        self._attention, self._kv_layers, self._arena = attention, kv_layers, arena
        decodes = batch.sequences[: batch.num_decodes]
        self._num_decodes = batch.num_decodes
        self._prompts: Sequence[SequenceSpan] = batch.sequences[batch.num_decodes :]
        self._reads = torch.tensor([s.state_read for s in decodes], device=device)
        self._writes = torch.tensor([s.state_write for s in decodes], device=device)
        kept = [(row, slot) for row, s in enumerate(decodes) for _, slot in s.cuts]
        self._kept = torch.tensor(kept, device=device).T if kept else None

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

    def convolve(
        self,
        layer: int,
        values: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
    ) -> torch.Tensor:
        """See `MixerStep`."""
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
            for start, end in _chunks(span):
                output[start:end], state = scan.chunk(start, end, state)
                for slot in [slot for count, slot in span.cuts if count == end - span.start]:
                    pool[slot] = state
            pool[span.state_write] = state
        return output

    def _write(self, pool: torch.Tensor, states: torch.Tensor) -> None:
        """Write what decodes leave, `[R, ...]`, to their slots and those that keep it."""
        pool[self._writes] = states
        if self._kept is not None:
            pool[self._kept[1]] = states[self._kept[0]]


def _chunks(span: SequenceSpan) -> Iterator[tuple[int, int]]:
    """Rows of a sequence's tokens, cut where positions are multiples of `GRID`, and at its cuts."""
    row, position = span.start, span.context_len - span.num_tokens
    for count in (*(count for count, _ in span.cuts), span.num_tokens):
        end = span.start + count
        while row < end:
            stop = min(end, row + GRID - position % GRID)
            yield row, stop
            position += stop - row
            row = stop
