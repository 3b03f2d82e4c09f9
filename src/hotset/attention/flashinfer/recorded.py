"""FlashInfer's attention in steps that CUDA graphs hold: at fixed places, whatever the step."""

from collections.abc import Sequence

import torch

from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.backend import FlashInferAttention, FlashInferBackend
from hotset.attention.inputs import Inputs


class StaticDecode:
    """Attention of a decode step of B sequences that a CUDA graph can hold; `plan` fills it.

    Args:
        inputs: the tensors that the graph reads, of B tokens.
        block_ids: int32, for as many blocks as B sequences can have together. Steps that run
            one after another can share it.
        scratch_block: a block that nobody reads, for the rows beyond the step's sequences.

    Attributes:
        attention: of the class that other steps have too, as compiled code is made for a class.
    """

    def __init__(
        self,
        backend: FlashInferBackend,
        inputs: Inputs,
        *,
        block_ids: torch.Tensor,
        scratch_block: int,
    ) -> None:
        self._backend = backend
        self._size = len(inputs.token_ids)
        self._wrappers = backend.decode_wrappers(self._size, block_ids)
        self._padding = SequenceSpan(0, 1, 1, [scratch_block])
        self.attention = FlashInferAttention(backend, inputs, self._run)

    def plan(self, sequences: Sequence[SequenceSpan]) -> None:
        """Plan for at most B sequences of one token; the rows beyond them attend to nothing."""
        backend = self._backend
        padded = [*sequences, *[self._padding] * (self._size - len(sequences))]
        backend.wait_for_plan()
        backend.plan_decode(self._wrappers, padded)
        backend.note_plan()

    def _run(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        self._backend.attend(self._wrappers, layer, query, output)
        if self._backend.value_scales[layer] != 1:
            output.mul_(self._backend.value_scales[layer])
        return output


class StaticMixed:
    """Attention of any step that a CUDA graph can hold; `plan` fills it.

    All recorded steps share one, as every plan has the same form: that of S sequences of one token
    and S others, most of them empty.

    Args:
        max_num_seqs: most sequences of a step.
        max_num_tokens: most tokens of a step.
        block_ids: int32, for as many blocks as S sequences can have together. What runs before or
            after can share it.
        scratch_block: a block that nobody reads.

    Attributes:
        num_seqs: S.
    """

    def __init__(
        self,
        backend: FlashInferBackend,
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
        self._decode = backend.mixed_wrappers(self.num_seqs, block_ids, is_prompts=False)
        # No context is longer than S sequences have, but what a step is recorded with may be.
        most_blocks = max(len(block_ids), -(-max_num_tokens // backend.arena.block_size))
        self._prompts = backend.mixed_wrappers(
            self.num_seqs, block_ids.new_zeros(most_blocks), is_prompts=True
        )
        # FlashInfer takes the first plan as the largest. With as many tokens as sequences, it lays
        # out the first kernel for sequences of one token.
        self.begin(max_num_tokens)

    def begin(self, num_tokens: int) -> None:
        """Plan what a step of `num_tokens` is recorded with, and nothing else may run with."""
        scratch = [self._scratch_block]
        num_blocks = -(-num_tokens // self._backend.arena.block_size)
        prompt = SequenceSpan(0, num_tokens, num_tokens, scratch * num_blocks)
        decodes = [SequenceSpan(0, 1, 1, scratch)] * min(self.num_seqs, num_tokens)
        self._plan(decodes, [prompt], first_row=0)

    def holds(self, batch: Batch) -> bool:
        """Whether there is room for a step's sequences, as many tokens as it has."""
        if len(batch.sequences) > self.num_seqs:
            return False
        prompts = batch.sequences[batch.num_decodes :]
        return not self._backend.widens or self._backend.can_widen(prompts)

    def plan(self, batch: Batch) -> None:
        """Plan a step that `holds` allows; rows beyond its tokens idle."""
        sequences, n = batch.sequences, batch.num_decodes
        self._plan(sequences[:n], sequences[n:], first_row=n)

    def plan_nothing(self) -> None:
        """Plan a step of no sequence, which recorded steps of any size can run with."""
        self._plan([], [], first_row=0)

    def _plan(
        self, decodes: Sequence[SequenceSpan], prompts: Sequence[SequenceSpan], *, first_row: int
    ) -> None:
        backend, num_seqs = self._backend, self.num_seqs
        backend.wait_for_plan()
        backend.plan_prefill(self._decode, decodes, num_seqs=num_seqs, causal=False)
        backend.plan_prefill(
            self._prompts,
            prompts,
            num_seqs=num_seqs,
            first_row=first_row,
            is_widened=backend.widens,
        )
        backend.note_plan()

    def run(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """See `FlashInferAttention`; for `query` of as many tokens as `begin` was told."""
        backend = self._backend
        output = self._outputs[backend.kinds[layer]][: len(query)]
        with backend.beside():
            backend.attend(self._prompts, layer, query, output, is_widened=backend.widens)
        n = min(self.num_seqs, len(query))
        backend.attend(self._decode, layer, query[:n], output[:n])
        backend.join()
        scale = backend.value_scales[layer]
        return output if scale == 1 else output * scale  # rows that idle would grow in place
