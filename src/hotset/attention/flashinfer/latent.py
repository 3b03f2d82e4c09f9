"""Attention over latents by FlashInfer, on Hopper, straight from the rows of the pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hotset.attention.backend import RecordableBackend, Run, StepAttention
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.build import why_not_built
from hotset.attention.flashinfer.kernels import KernelBuild, start_kernels
from hotset.attention.flashinfer.latent_rows import (
    LATENT_WORKSPACE_BYTES,
    Rows,
    make_rows,
    most_rows,
    parts,
    scratch_rows,
)
from hotset.attention.inputs import Inputs, to_device
from hotset.attention.latent import LatentWeights
from hotset.attention.spec import LayerAttention
from hotset.cost.cache_spec import Latent
from hotset.errors import ModelError
from hotset.memory.arena import DeviceArena


class LatentBackend(RecordableBackend):
    """Attention of one step after another, launched or recorded, all by one kernel.

    Queries are absorbed: they attend to latents, and their output is turned into values after. A
    plan lies in memory of the wrapper, and each step plans before it runs, so that all steps share
    one wrapper; those of more rows than a plan has room for take one wrapper per part.

    Args:
        arena: has the latents.
        layers: what each asks for, all the same.
        kernels: being built; None builds them here.
        waits: until they are built; otherwise `load` is to be called first.

    Raises:
        ModelError: FlashInfer is not installed or cannot be built.
    """

    is_complete = True

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        *,
        kernels: KernelBuild | None = None,
        waits: bool = True,
    ) -> None:
        try:
            from flashinfer.mla import BatchMLAPagedAttentionWrapper

            from hotset.kernels.store_latent import store_latent
        except (ImportError, OSError, RuntimeError) as error:
            raise ModelError(
                f"attention on an NVIDIA GPU needs flashinfer-python and triton ({error}); "
                "pip install 'hotset[cuda]'"
            ) from error
        self.store_latent = store_latent
        self._wrapper_class = BatchMLAPagedAttentionWrapper
        self._planned = torch.cuda.Event()
        self._kernels = kernels or start_kernels(layers, arena.storage.dtype, arena.storage.device)
        self._set_up(arena, layers, LATENT_WORKSPACE_BYTES)
        if waits:
            self.load()

    def _set_up(
        self, arena: DeviceArena, layers: Sequence[LayerAttention], workspace_bytes: int
    ) -> None:
        spec = layers[0].cache
        assert isinstance(spec, Latent)
        self.arena, self.device = arena, arena.storage.device
        self.rank, self.rope_dim = spec.rank, spec.rope_dim
        self.weights = [layer.latent for layer in layers if layer.latent is not None]
        self.caches = [cache.split([spec.rank, spec.rope_dim], dim=-1) for cache in arena.layers]
        self._asked = layers[0]
        self._most_rows = most_rows(self._asked.num_heads)
        self._workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=self.device)
        self._wrappers: list[Any] = []
        # Rows beyond a recorded step keep what they had, which is finite.
        self._output = torch.zeros(0, dtype=self._asked.dtype, device=self.device)

    def load(self) -> None:
        """See `RecordableBackend`."""
        if self._kernels is not None:
            self._kernels.wait("fa3")
        scratch_block = self.arena.num_blocks - 1  # other memory of the arena may be in use
        asked, zero = self._asked, torch.zeros(1, dtype=torch.int64, device=self.device)
        row = torch.zeros(1, self.rank + self.rope_dim, dtype=asked.dtype, device=self.device)
        query = row.expand(asked.num_heads, -1).unsqueeze(0).contiguous()
        try:
            latent, rotary = row.split([self.rank, self.rope_dim], dim=1)
            self.store_latent(latent, rotary, self.arena.layers[0], zero + scratch_block, zero)
            step = self._launched(scratch_rows(1, scratch_block))
            step.run(0, query, torch.empty_like(query[..., : self.rank]))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler that is not there makes of it
            reason = why_not_built(error, torch.version.cuda)
            raise ModelError(
                f"FlashInfer cannot build its attention kernels, which eager steps need too: "
                f"{reason}"
            ) from error

    def use_all_kernels(self, *, waits: bool) -> bool:
        """See `RecordableBackend`: there is one."""
        return True

    def begin_step(self, batch: Batch, inputs: Inputs) -> "LatentAttention":
        """See `AttentionBackend`."""
        step = self.plan(batch)

        def run(layer: int, query: torch.Tensor) -> torch.Tensor:
            return step.run(layer, query, torch.empty_like(query[..., : self.rank]))

        return LatentAttention(self, inputs, run)

    def step_with(self, inputs: Inputs, run: Run) -> "LatentAttention":
        """See `RecordableBackend`."""
        return LatentAttention(self, inputs, run)

    def plan(self, batch: Batch) -> "PlannedLatents":
        """See `RecordableBackend`."""
        return self._launched(make_rows(batch.sequences))

    @property
    def most_recorded_seqs(self) -> int:
        """See `RecordableBackend`."""
        return self._most_rows

    @property
    def can_record_prompts(self) -> bool:
        """See `RecordableBackend`: they are launched as decodes are."""
        return True

    def record_decode(
        self, inputs: Inputs, *, block_ids: torch.Tensor, scratch_block: int
    ) -> "RecordedLatents":
        """See `RecordableBackend`."""
        return RecordedLatents(self, len(inputs.token_ids), block_ids, scratch_block, inputs)

    def record_mixed(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        block_ids: torch.Tensor,
        scratch_block: int,
    ) -> "RecordedLatents":
        """See `RecordableBackend`."""
        return RecordedLatents(self, max_num_tokens, block_ids, scratch_block)

    def recorded_output(self, num_rows: int) -> torch.Tensor:
        """`[T, H, R]` at a fixed place, finite, which all recorded steps write."""
        if len(self._output) < num_rows:
            shape = (num_rows, self._asked.num_heads, self.rank)
            self._output = self._output.new_zeros(shape)
        return self._output[:num_rows]

    def _launched(self, rows: Rows) -> "PlannedLatents":
        """Plan a launched step, in as many parts as it takes."""
        slices = parts(len(rows.lens), self._most_rows)
        self.plan_rows(rows, slices, to_device(rows.block_ids, self.device))
        return PlannedLatents(self, slices)

    def plan_rows(self, rows: Rows, slices: Sequence[slice], block_ids: torch.Tensor) -> None:
        """Plan some parts of `rows`, whose blocks `block_ids` has, int32 on the device."""
        self.wait_for_plan()
        asked = self._asked
        while len(self._wrappers) < len(slices):
            # Without FlashInfer's own way to record, which wants the same number of rows each time:
            # what its kernels read lies at fixed places anyway.
            self._wrappers.append(self._wrapper_class(self._workspace, backend="fa3"))
        for wrapper, part in zip(self._wrappers, slices, strict=False):
            wrapper.plan(
                torch.from_numpy(rows.query_starts[: part.stop - part.start + 1]),
                torch.from_numpy(rows.block_starts[part.start : part.stop + 1]),
                block_ids,
                torch.from_numpy(rows.lens[part]),
                asked.num_heads,
                self.rank,
                self.rope_dim,
                self.arena.block_size,
                False,  # a row is all of its sequence's queries
                asked.scaling,
                asked.dtype,
                self.arena.storage.dtype,
            )
        self.note_plan()

    def attend(
        self, layer: int, query: torch.Tensor, output: torch.Tensor, slices: Sequence[slice]
    ) -> None:
        """Run a layer's kernel as planned, from `query`, `[T, H, R + P]`, to `output`.

        `output` is `[T, H, R]`; rows that were not planned stay as they are.
        """
        latents, rotary = self.caches[layer]
        for wrapper, part in zip(self._wrappers, slices, strict=False):
            asked = query[part]
            wrapper.run(
                asked[..., : self.rank],
                asked[..., self.rank :],
                latents,
                rotary,
                out=output[part],
            )

    def wait_for_plan(self) -> None:
        """Block until the last plan is on the device, which it is as soon as its step begins."""
        self._planned.synchronize()

    def note_plan(self) -> None:
        """A plan was submitted."""
        self._planned.record()


@dataclass(frozen=True, slots=True)
class PlannedLatents:
    """The kernel of a planned step; see `PlannedStep`.

    Attributes:
        slices: the rows of each plan.
    """

    backend: LatentBackend
    slices: list[slice]

    def run(self, layer: int, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """See `PlannedStep`; `query` is absorbed, `[T, H, R + P]`, and `output` `[T, H, R]`."""
        self.backend.attend(layer, query, output, self.slices)
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
        backend: LatentBackend,
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
        """See `RecordedMixed`: a step that has a size fits, whatever its sequences are."""
        return True

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
    """

    def __init__(self, backend: LatentBackend, inputs: Inputs, run: Run) -> None:
        self._backend = backend
        self._inputs = inputs
        self._run = run

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See `StepAttention`."""
        backend, inputs = self._backend, self._inputs
        rows = backend.arena.layers[layer]
        backend.store_latent(value[0], key[0], rows, inputs.blocks, inputs.offsets)
        weights = backend.weights[layer]
        absorbed = _absorbed(weights, query)
        latents = self._run(layer, absorbed.transpose(0, 1))[..., : backend.rank]  # [T, H, R]
        return weights.mix(latents.transpose(0, 1)).transpose(0, 1)


def _absorbed(weights: LatentWeights, query: torch.Tensor) -> torch.Tensor:
    """As `LatentWeights.absorb`, without a product to be copied: `[H, T, R + P]`."""
    num_heads, num_tokens, _ = query.shape
    nope_dim, rank = weights.nope_dim, weights.heads.shape[-1]
    rotary = query[..., nope_dim:]
    absorbed = query.new_empty(num_heads, num_tokens, rank + rotary.shape[-1])
    torch.bmm(query[..., :nope_dim], weights.keys, out=absorbed[..., :rank])
    absorbed[..., rank:] = rotary
    return absorbed
