"""Steps over latents by FlashInfer: planned, recorded, and as layers call them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hotset.attention.backend import Run, StepAttention
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.expanded import PlannedPrompt
from hotset.attention.flashinfer.latent_rows import Rows, make_rows, scratch_rows
from hotset.attention.inputs import Inputs, to_device
from hotset.attention.latent import LatentWeights
from hotset.attention.sparse.indexer import Index

if TYPE_CHECKING:
    from hotset.attention.flashinfer.latent import LatentBackend


@dataclass(frozen=True, slots=True)
class PlannedLatents:
    """The kernel of a planned step; see `PlannedStep`.

    Attributes:
        slices: the rows of each plan.
    """

    backend: "LatentBackend"
    slices: list[slice]

    def run(self, layer: int, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """See `PlannedStep`; `query` is absorbed, `[T, H, R + P]`, and `output` `[T, H, R]`."""
        self.backend.attend(layer, query, output, self.slices)
        return output


@dataclass(frozen=True, slots=True)
class PlannedWithPrompts:
    """The kernels of a step with long prompts, planned.

    Attributes:
        slices: the rows of each plan of absorbed queries.
        prompts: those that have the other rows.
        num_tokens: of all sequences.
    """

    backend: "LatentBackend"
    slices: list[slice]
    prompts: list[PlannedPrompt]
    num_tokens: int

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attend from `[H, T, D]` queries to a layer's rows: `[T, H, D_v]`."""
        backend, weights = self.backend, self.backend.weights[layer]
        num_heads, num_tokens, _ = query.shape
        output = query.new_empty(num_tokens, num_heads, weights.heads.shape[1] - weights.nope_dim)
        for index, rows in enumerate(self.slices):
            absorbed = _absorbed(weights, query[:, rows]).transpose(0, 1)
            latents = torch.empty_like(absorbed[..., : backend.rank])
            backend.attend_part(index, layer, absorbed, latents)
            _mix(weights, latents, output[rows])
        cache = backend.arena.layers[layer]
        for prompt in self.prompts:
            asked, own = query[:, prompt.rows], output[prompt.rows]
            backend.expanded.attend(prompt, weights, cache, asked, own)
        output[self.num_tokens :] = 0  # of padding
        return output


class RecordedLatents:
    """Attention of recorded steps of at most `num_rows` tokens, of any kind.

    Implements `RecordedDecode`, with `inputs`, and `RecordedMixed`. Rows beyond a step are not
    planned: a plan tells the kernel the rows, and has the same form for any number of them.

    Args:
        backend: has the latents.
        num_rows: most tokens of a step.
        block_ids: see `RecordableBackend.record_decode`.
        scratch_block: likewise.
        inputs: of a step of decodes.
    """

    def __init__(
        self,
        backend: "LatentBackend",
        num_rows: int,
        block_ids: torch.Tensor,
        scratch_block: int,
        inputs: Inputs | None = None,
    ) -> None:
        self._backend, self._block_ids, self._scratch_block = backend, block_ids, scratch_block
        self._output = backend.recorded_output(num_rows)
        if inputs is not None:
            self.attention: StepAttention = backend.step_with(inputs, self.run)

    def begin(self, num_tokens: int) -> None:
        """See `RecordedMixed`."""
        self._plan(scratch_rows(num_tokens, self._scratch_block))

    def holds(self, batch: Batch) -> bool:
        """See `RecordedMixed`: a step that has a size fits, unless its prompts gain by another."""
        return not self._backend.long_prompts(batch)

    def plan(self, step: Batch | Sequence[SequenceSpan]) -> None:
        """See `RecordedMixed`, or `RecordedDecode` for its sequences."""
        sequences = step.sequences if isinstance(step, Batch) else step
        if not sequences:
            return self.plan_nothing()
        self._plan(make_rows(sequences))

    def plan_nothing(self) -> None:
        """See `RecordedMixed`."""
        self._plan(scratch_rows(1, self._scratch_block))

    def _plan(self, rows: Rows) -> None:
        used = self._block_ids[: len(rows.block_ids)]
        used.copy_(to_device(rows.block_ids, self._backend.device))
        self._backend.plan_rows(rows, [slice(0, len(rows.lens))], self._block_ids)

    def run(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """See `RecordedMixed`; `query` is absorbed, `[T, H, R + P]`."""
        output = self._output[: len(query)]
        self._backend.attend(layer, query, output, [slice(0, len(query))])
        return output


class LatentAttention:
    """The attention of one step; implements `StepAttention`.

    Args:
        backend: has the latents.
        inputs: the step's tokens.
        run: attends once a layer's latents are stored.
        planned: attends in its place, in a step with long prompts.
    """

    def __init__(
        self,
        backend: "LatentBackend",
        inputs: Inputs,
        run: Run,
        planned: PlannedWithPrompts | None = None,
    ) -> None:
        self._backend = backend
        self._inputs = inputs
        self._run = run
        self._planned = planned

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """See `StepAttention`."""
        backend, inputs = self._backend, self._inputs
        rows = backend.arena.layers[layer]
        backend.store_latent(value[0], key[0], rows, inputs.blocks, inputs.offsets)
        if self._planned is not None:
            return self._planned.attend(layer, query)
        weights = backend.weights[layer]
        absorbed = _absorbed(weights, query)
        asked = () if index is None else (index,)
        latents = self._run(layer, absorbed.transpose(0, 1), *asked)[..., : backend.rank]
        output = query.new_empty(len(latents), len(query), weights.values.shape[1])
        _mix(weights, latents, output)
        return output


def _absorbed(weights: LatentWeights, query: torch.Tensor) -> torch.Tensor:
    """As `LatentWeights.absorb`, without a product to be copied: `[H, T, R + P]`."""
    num_heads, num_tokens, _ = query.shape
    nope_dim, rank = weights.nope_dim, weights.heads.shape[-1]
    rotary = query[..., nope_dim:]
    absorbed = query.new_empty(num_heads, num_tokens, rank + rotary.shape[-1])
    torch.bmm(query[..., :nope_dim], weights.keys, out=absorbed[..., :rank])
    absorbed[..., rank:] = rotary
    return absorbed


def _mix(weights: LatentWeights, latents: torch.Tensor, output: torch.Tensor) -> None:
    """As `LatentWeights.mix`, of `[T, H, R]` into `output`, `[T, H, D_v]`: nothing is copied."""
    mixed = output.transpose(0, 1)
    torch.bmm(latents.transpose(0, 1), weights.values.transpose(1, 2), out=mixed)
