"""FlashInfer's attention in steps that CUDA graphs hold: at fixed places, whatever the step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hotset.attention.backend import StepAttention
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.tables import blocks_of, padded, scratch_step
from hotset.attention.flashinfer.widened import WidenedKV
from hotset.attention.inputs import Inputs

if TYPE_CHECKING:
    from hotset.attention.flashinfer.backend import FlashInferBackend


class StaticDecode:
    """See `RecordableBackend.record_decode`; B is its size."""

    def __init__(
        self,
        backend: "FlashInferBackend",
        inputs: Inputs,
        *,
        block_ids: torch.Tensor,
        scratch_block: int,
    ) -> None:
        self._backend = backend
        self._size = len(inputs.token_ids)
        self._wrappers = backend.make.recorded_decodes(self._size, block_ids)
        self._scratch_block = scratch_block
        self.attention: StepAttention = backend.step_with(inputs, self._run)

    def plan(self, sequences: Sequence[SequenceSpan]) -> None:
        """Plan for at most B sequences of one token; the rows beyond them attend to nothing."""
        backend = self._backend
        backend.wait_for_plan()
        backend.plan_decode(self._wrappers, padded(sequences, self._size, self._scratch_block))
        backend.note_plan()

    def _run(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        output, sums = torch.empty_like(query), self._backend.make_sums(layer, query)
        self._backend.attend(self._wrappers, layer, query, output, sums)
        return self._backend.finish(layer, output, sums, in_place=True)


class StaticMixed:
    """See `RecordableBackend.record_mixed`.

    All recorded steps share one, as every plan has the same form: that of S sequences of one token
    and S others, most of them empty.

    Args:
        widened: the copy in 16 bits that prompts attend to; None: the cache itself.

    Attributes:
        num_seqs: S.
    """

    def __init__(
        self,
        backend: "FlashInferBackend",
        widened: WidenedKV | None,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        block_ids: torch.Tensor,
        scratch_block: int,
    ) -> None:
        self._backend = backend
        self._scratch_block = scratch_block
        self.num_seqs = min(max_num_seqs, max_num_tokens)
        # Of all layers. Rows beyond a step keep what they had, which is finite.
        self._outputs = {
            kind: torch.zeros(
                max_num_tokens,
                kind.num_heads,
                kind.head_dim,
                dtype=kind.dtype,
                device=backend.device,
            )
            for kind in dict.fromkeys(backend.kinds)
        }
        # Likewise, what scores sum to in layers with sinks.
        self._sums = {
            kind: torch.zeros(output.shape[:2], device=backend.device)
            for kind, output in self._outputs.items()
        }
        self._decode = backend.make.recorded_mixed(self.num_seqs, block_ids, is_prompts=False)
        # No context is longer than S sequences have, but what a step is recorded with may be.
        most_blocks = max(len(block_ids), blocks_of(max_num_tokens, backend.arena.block_size))
        self._prompts = backend.make.recorded_mixed(
            self.num_seqs, block_ids.new_zeros(most_blocks), is_prompts=True, widened=widened
        )
        # FlashInfer takes the first plan as the largest. With as many tokens as sequences, it lays
        # out the first kernel for sequences of one token.
        self.begin(max_num_tokens)

    def begin(self, num_tokens: int) -> None:
        """See `RecordedMixed`."""
        decodes, prompts = scratch_step(
            num_tokens, self.num_seqs, self._backend.arena.block_size, self._scratch_block
        )
        self._plan(decodes, prompts, first_row=0)

    def holds(self, batch: Batch) -> bool:
        """See `RecordedMixed`."""
        widened = self._prompts.widened
        return len(batch.sequences) <= self.num_seqs and (
            widened is None or widened.holds(batch.sequences[batch.num_decodes :])
        )

    def plan(self, batch: Batch) -> None:
        """See `RecordedMixed`; rows beyond the step's tokens idle."""
        sequences, n = batch.sequences, batch.num_decodes
        self._plan(sequences[:n], sequences[n:], first_row=n)

    def plan_nothing(self) -> None:
        """See `RecordedMixed`."""
        self._plan([], [], first_row=0)

    def _plan(
        self, decodes: Sequence[SequenceSpan], prompts: Sequence[SequenceSpan], *, first_row: int
    ) -> None:
        backend, num_seqs = self._backend, self.num_seqs
        backend.wait_for_plan()
        backend.plan_prefill(self._decode, decodes, num_seqs=num_seqs, causal=False)
        backend.plan_prefill(self._prompts, prompts, num_seqs=num_seqs, first_row=first_row)
        backend.note_plan()

    def run(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """See `RecordedMixed`."""
        backend = self._backend
        kind = backend.kinds[layer]
        output = self._outputs[kind][: len(query)]
        sums = None if backend.sinks[layer] is None else self._sums[kind][: len(query)]
        with backend.beside():
            backend.attend(self._prompts, layer, query, output, sums)
        n = min(self.num_seqs, len(query))
        decodes = None if sums is None else sums[:n]
        backend.attend(self._decode, layer, query[:n], output[:n], decodes)
        backend.join()
        # Rows that idle would grow in place.
        return backend.finish(layer, output, sums, in_place=False)
