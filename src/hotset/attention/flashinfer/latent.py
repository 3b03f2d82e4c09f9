"""Attention over latents by FlashInfer, on Hopper, straight from the rows of the pool."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from hotset.attention.backend import RecordableBackend, Run
from hotset.attention.batch import Batch
from hotset.attention.flashinfer.build import building, importing, why_not_built
from hotset.attention.flashinfer.expanded import ExpandedKernels, ExpandedPrompts
from hotset.attention.flashinfer.kernels import KernelBuild, start_kernels
from hotset.attention.flashinfer.latent_rows import (
    LATENT_WORKSPACE_BYTES,
    Rows,
    make_rows,
    most_rows,
    parts,
    scratch_rows,
)
from hotset.attention.flashinfer.latent_steps import (
    LatentAttention,
    PlannedLatents,
    PlannedWithPrompts,
    RecordedLatents,
)
from hotset.attention.flashinfer.long_prompts import (
    LongPrompt,
    can_expand,
    long_prompts,
    most_piece_tokens,
    rows_between,
)
from hotset.attention.inputs import Inputs, to_device
from hotset.attention.spec import LayerAttention
from hotset.cost.cache_spec import Latent
from hotset.memory.arena import DeviceArena

_log = logging.getLogger(__name__)


class LatentBackend(RecordableBackend):
    """Attention of one step after another, launched or recorded.

    Queries are absorbed: they attend to latents, and their output is turned into values after. A
    plan lies in memory of the wrapper, and each step plans before it runs, so that all steps share
    one wrapper; those of more rows than a plan has room for take one wrapper per part.

    Long prompts attend to keys and values of all heads where that pays, in steps that are launched;
    until that kernel is built, and where it cannot be, they are absorbed, too.

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
        with importing():
            from flashinfer import BatchPrefillWithRaggedKVCacheWrapper
            from flashinfer.mla import BatchMLAPagedAttentionWrapper

            from hotset.kernels.gather_latents import gather_latents
            from hotset.kernels.merge_states import merge_states
            from hotset.kernels.store_latent import store_latent
        self.store_latent = store_latent
        self._wrapper_class = BatchMLAPagedAttentionWrapper
        self._planned = torch.cuda.Event()
        self._kernels = kernels or start_kernels(layers, arena.storage.dtype, arena.storage.device)
        self._set_up(arena, layers, LATENT_WORKSPACE_BYTES)
        self.expanded = ExpandedPrompts(
            ExpandedKernels(BatchPrefillWithRaggedKVCacheWrapper, gather_latents, merge_states),
            self._workspace,
            layers[0],
            piece_tokens=most_piece_tokens(layers[0].heads),
        )
        self._expands: bool | None = None  # not known yet
        if waits:
            self.load()
            self.use_all_kernels(waits=True)

    def _set_up(
        self, arena: DeviceArena, layers: Sequence[LayerAttention], workspace_bytes: int
    ) -> None:
        spec = layers[0].cache
        assert isinstance(spec, Latent)
        self.arena, self.device = arena, arena.storage.device
        self._spec, self.rank, self.rope_dim = spec, spec.rank, spec.rope_dim
        self.weights = [layer.latent for layer in layers if layer.latent is not None]
        self.caches = [cache.split([spec.rank, spec.rope_dim], dim=-1) for cache in arena.layers]
        self._page_size = arena.block_size
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
        with building():
            latent, rotary = row.split([self.rank, self.rope_dim], dim=1)
            self.store_latent(latent, rotary, self.arena.layers[0], zero + scratch_block, zero)
            self._try(query, scratch_rows(1, scratch_block))

    def _try(self, query: torch.Tensor, rows: Rows) -> None:
        """Attend from one absorbed query, so that its kernels are there."""
        self._launched(rows).run(0, query, torch.empty_like(query[..., : self.rank]))

    def use_all_kernels(self, *, waits: bool) -> bool:
        """Attend to long prompts by their own kernel from now on, if it is built or `waits`.

        Nothing has to wait for it, so the answer is True. Where it cannot be used, a warning says
        why.
        """
        if self._expands is None and can_expand(self._spec.expanded):
            if waits and self._kernels is not None:
                self._kernels.wait("ragged")
            if self._kernels is None or self._kernels.is_ready("ragged"):
                self._expands = self._can_expand()
        return True

    def _can_expand(self) -> bool:
        """Try the kernels for long prompts, with two pieces."""
        asked, heads = self._asked, self._asked.heads
        prompt = LongPrompt(slice(0, 1), 1, [self.arena.num_blocks - 1], 1)
        query = torch.zeros(
            asked.num_heads, 1, heads.key_dim, dtype=asked.dtype, device=self.device
        )
        output = query.new_empty(1, asked.num_heads, heads.value_dim)
        self.wait_for_plan()
        try:
            [planned] = self.expanded.plan([prompt])
            self.expanded.attend(planned, self.weights[0], self.arena.layers[0], query, output)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler that is not there makes of it
            reason = why_not_built(error, torch.version.cuda)
            _log.warning("long prompts attend to latents, which is slower: %s", reason)
            return False
        finally:
            self.note_plan()
        return True

    def long_prompts(self, batch: Batch) -> list[LongPrompt]:
        """The prompts of a step that attend to keys and values of all heads."""
        if self._expands is None and batch.num_decodes < len(batch.sequences):
            self.use_all_kernels(waits=False)
        if not self._expands:
            return []
        return long_prompts(batch.sequences, self._spec, self.expanded.piece_tokens)

    def begin_step(self, batch: Batch, inputs: Inputs) -> LatentAttention:
        """See `AttentionBackend`."""
        if prompts := self.long_prompts(batch):
            return LatentAttention(self, inputs, self._never, self._plan_with(prompts, batch))
        step, end = self.plan(batch), batch.num_attending

        def run(layer: int, query: torch.Tensor) -> torch.Tensor:
            output = step.run(layer, query, torch.empty_like(query[..., : self.rank]))
            output[end:] = 0  # of padding
            return output

        return LatentAttention(self, inputs, run)

    @staticmethod
    def _never(layer: int, query: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a step with long prompts attends by its plan")

    def _plan_with(self, prompts: Sequence[LongPrompt], batch: Batch) -> PlannedWithPrompts:
        rows = make_rows(batch.sequences)
        slices = [
            slice(run.start + part.start, run.start + part.stop)
            for run in rows_between(prompts, batch.num_attending)
            for part in parts(run.stop - run.start, self._most_rows)
        ]
        self.plan_rows(rows, slices, to_device(rows.block_ids, self.device))
        planned = self.expanded.plan(prompts)
        self.note_plan()
        return PlannedWithPrompts(self, slices, planned, batch.num_attending)

    def step_with(self, inputs: Inputs, run: Run) -> LatentAttention:
        """See `RecordableBackend`."""
        return LatentAttention(self, inputs, run)

    def plan(self, batch: Batch) -> PlannedLatents:
        """See `RecordableBackend`."""
        if not batch.sequences:
            return self._launched(scratch_rows(1, self.arena.num_blocks - 1))
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
    ) -> RecordedLatents:
        """See `RecordableBackend`."""
        return self._recorded(len(inputs.token_ids), block_ids, scratch_block, inputs)

    def record_mixed(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        block_ids: torch.Tensor,
        scratch_block: int,
    ) -> RecordedLatents:
        """See `RecordableBackend`."""
        return self._recorded(max_num_tokens, block_ids, scratch_block)

    def _recorded(
        self,
        num_rows: int,
        block_ids: torch.Tensor,
        scratch_block: int,
        inputs: Inputs | None = None,
    ) -> RecordedLatents:
        return RecordedLatents(self, num_rows, block_ids, scratch_block, inputs)

    def recorded_output(self, num_rows: int) -> torch.Tensor:
        """`[T, H, R]` at a fixed place, finite, which all recorded steps write."""
        if len(self._output) < num_rows:
            shape = (num_rows, self._asked.num_heads, self.rank)
            self._output = self._output.new_zeros(shape)
        return self._output[:num_rows]

    def _launched(self, rows: Rows) -> PlannedLatents:
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
                self._page_size,
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
        for index, part in enumerate(slices):
            self.attend_part(index, layer, query[part], output[part])

    def attend_part(
        self, index: int, layer: int, query: torch.Tensor, output: torch.Tensor, **options: Any
    ) -> None:
        """The same for the rows of one plan, with more options of FlashInfer's."""
        latents, rotary = self.caches[layer]
        asked, asked_rotary = query[..., : self.rank], query[..., self.rank :]
        self._wrappers[index].run(asked, asked_rotary, latents, rotary, out=output, **options)

    def wait_for_plan(self) -> None:
        """Block until the last plan is on the device, which it is as soon as its step begins."""
        self._planned.synchronize()

    def note_plan(self) -> None:
        """A plan was submitted."""
        self._planned.record()
