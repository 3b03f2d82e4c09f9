"""Paged attention by FlashInfer, on NVIDIA GPUs, straight from the block-major pool."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from hotset.attention.backend import RecordableBackend, Run
from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.build import building, importing
from hotset.attention.flashinfer.kernels import (
    KernelBuild,
    has_hopper_kernel,
    start_kernels,
    use_paged_kernels,
)
from hotset.attention.flashinfer.limits import most_recorded_seqs
from hotset.attention.flashinfer.recorded import StaticDecode, StaticMixed
from hotset.attention.flashinfer.tables import make_tables, most_query_tokens
from hotset.attention.flashinfer.widened import WidenedKV
from hotset.attention.flashinfer.wrappers import AttentionKind, WrapperMaker, Wrappers, kind_of
from hotset.attention.inputs import Inputs, to_device
from hotset.attention.sparse.indexer import Index
from hotset.attention.spec import LayerAttention
from hotset.errors import ModelError
from hotset.memory.arena import DeviceArena

_log = logging.getLogger(__name__)

# Queries, outputs, and what scores sum to where a layer has sinks; of the same tokens.
Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class FlashInferBackend(RecordableBackend):
    """Attention of one step after another, launched or recorded.

    Sequences of one token go through the decode kernel on tensor cores (measured on an H200:
    4.39 TB/s against 2.95 without), the others through the prefill kernel. Both run at once: one
    reads memory, the other computes. Where the prefill kernel for Hopper takes no 8-bit cache,
    prompts attend to a copy in 16 bits, if there is room for it.

    The kernel for Hopper takes a minute to compile, the other a quarter of that: after `load`, and
    before `use_all_kernels`, the other one serves prompts too.

    Args:
        arena: has the cache.
        layers: what each asks for.
        kernels: being built; None builds them here.
        waits: until all are built; otherwise `load` is to be called first.

    Attributes:
        is_complete: whether all kernels are there.

    Raises:
        ModelError: FlashInfer is not installed or cannot be built.
    """

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        *,
        kernels: KernelBuild | None = None,
        waits: bool = True,
    ) -> None:
        with importing():
            import flashinfer

            from hotset.kernels.leave_to_sinks import leave_to_sinks
            from hotset.kernels.store_kv import store_kv
        use_paged_kernels(flashinfer.prefill)
        self.store_kv, self.leave_to_sinks = store_kv, leave_to_sinks
        self.arena = arena
        self.device = arena.storage.device
        self.kinds = [kind_of(layer) for layer in layers]
        # keys and values of each layer, [num_blocks, block_size, H_kv, D]
        self.caches = [layer.unbind(1) for layer in arena.layers]
        self.value_scales = [value_scale for _, value_scale in arena.scales]
        self.sinks = [layer.sinks for layer in layers]
        self._beside = torch.cuda.Stream(self.device)
        self._forked, self._joined = torch.cuda.Event(), torch.cuda.Event()
        self._widened: WidenedKV | None = None
        self.make = WrapperMaker(flashinfer, list(dict.fromkeys(self.kinds)), self.device)
        self._decode = self.make.decodes()
        self._prefill = self.make.prompts("fa2")
        self._prefill_widened: Wrappers | None = None
        # FlashInfer stages a plan in pinned memory of the wrapper: the next plan must not
        # overwrite it before it has been copied.
        self._planned = torch.cuda.Event()
        self.is_complete = False
        self._can_use_hopper = True
        self._kernels = kernels or start_kernels(layers, arena.storage.dtype, self.device)
        if waits:
            self.load()
            self.use_all_kernels(waits=True)

    def load(self) -> None:
        """Wait for the kernels that any step needs.

        Raises:
            ModelError: they cannot be built.
        """
        if self._kernels is not None:
            self._kernels.wait("fa2")
        self._load()

    def use_all_kernels(self, *, waits: bool) -> bool:
        """Attend to prompts by the kernel for Hopper from now on, if it is built or `waits`.

        Returns whether that is so, or the GPU is another. May be called between two steps. Where
        it cannot be used and this does not wait, requests are served already, by the other kernel:
        that stays in use, and a warning says why.

        Raises:
            ModelError: it cannot be built, with `waits`.
        """
        if self.is_complete:
            return True
        if self._kernels is not None:
            if waits:
                self._kernels.wait("fa3")
            elif not self._kernels.is_ready("fa3"):
                return False
        self.wait_for_plan()
        former = self._widened, self._prefill, self._prefill_widened
        try:
            self._widened = self._make_widened()
            self._prefill = self.make.prompts("auto")
            if self._widened is not None:
                self._prefill_widened = self.make.prompts("auto", self._widened)
            self._load()
        except (ModelError, torch.OutOfMemoryError) as error:
            if waits:
                raise
            self._widened, self._prefill, self._prefill_widened = former
            self._can_use_hopper = False
            _log.warning("prompts stay with the kernel for any GPU, which is slower: %s", error)
        self.is_complete = True
        return True

    def _load(self) -> None:
        """Load the kernels that steps need from FlashInfer's cache, or else compile them."""
        scratch_block = self.arena.num_blocks - 1  # other memory of the arena may be in use
        one = SequenceSpan(0, 1, 1, [scratch_block])
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        cache, kind = self.arena.layers[0], self.kinds[0]
        token = torch.zeros(
            kind.num_kv_heads, 1, kind.head_dim, dtype=kind.dtype, device=self.device
        )
        with building():
            self.plan_decode(self._decode, [one])
            self.plan_prefill(self._prefill, [one])
            if self._prefill_widened is not None:
                self.plan_prefill(self._prefill_widened, [one])
            self.store_kv(token, token, cache, zero + scratch_block, zero)
        self.note_plan()

    def _make_widened(self) -> WidenedKV | None:
        """Where the kernel for Hopper is to attend to an 8-bit cache."""
        dtype, kv_dtype = self.kinds[0].dtype, self.arena.storage.dtype
        if self._takes_hopper_kernel(kv_dtype) or not self._takes_hopper_kernel(dtype):
            return None
        return WidenedKV(self.arena, dtype)

    def _takes_hopper_kernel(self, kv_dtype: torch.dtype) -> bool:
        return has_hopper_kernel(self.device, self.kinds[0].dtype, kv_dtype)

    def begin_step(self, batch: Batch, inputs: Inputs) -> "FlashInferAttention":
        """See `AttentionBackend`."""
        return FlashInferAttention(self, inputs, self.plan(batch).run)

    def step_with(self, inputs: Inputs, run: Run) -> "FlashInferAttention":
        """See `RecordableBackend`."""
        return FlashInferAttention(self, inputs, run)

    def plan(self, batch: Batch) -> "LaunchedStep":
        """See `RecordableBackend`."""
        self.wait_for_plan()
        sequences, n = batch.sequences, batch.num_decodes
        prompts = self._prefill
        if n:
            self.plan_decode(self._decode, sequences[:n])
        if n < len(sequences):
            if self._prefill_widened is not None and self.can_widen(sequences[n:]):
                prompts = self._prefill_widened
            self.plan_prefill(prompts, sequences[n:])
        self.note_plan()
        return LaunchedStep(self, self._decode, prompts, n, batch.num_attending)

    def attend(
        self,
        wrappers: Wrappers,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        sums: torch.Tensor | None,
    ) -> None:
        """Run a layer's kernel as `wrappers` are planned, from `query` to `output`, `[T, H, D]`.

        `sums` is as `make_sums` gives it, of the same rows. `finish` is to follow: FlashInfer would
        scale all rows of `output`, also those that another kernel fills meanwhile.
        """
        widened = wrappers.widened
        cache = self.caches[layer] if widened is None else widened.widen(layer)
        key_scale = self.arena.scales[layer][0]
        wrappers.by_kind[self.kinds[layer]].run(
            query,
            cache,
            out=output,
            k_scale=None if key_scale == 1 else key_scale,
            **({} if sums is None else {"lse": sums, "return_lse": True}),
        )

    def make_sums(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        """`[T, H]` for the logarithms of what scores sum to, where a layer has sinks; else None."""
        if self.sinks[layer] is None:
            return None
        return query.new_empty(query.shape[:2], dtype=torch.float32)

    def finish(
        self, layer: int, output: torch.Tensor, sums: torch.Tensor | None, *, in_place: bool
    ) -> torch.Tensor:
        """What a layer attends to, of what `attend` gave: with its scale and its sinks."""
        sinks, scale = self.sinks[layer], self.value_scales[layer]
        if sinks is None or sums is None:
            if scale == 1:
                return output
            return output.mul_(scale) if in_place else output * scale
        target = output if in_place else torch.empty_like(output)
        self.leave_to_sinks(output, sums, sinks, target, scale=scale)
        return target

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is submitted within runs beside what is submitted from then on, until `join`."""
        self._forked.record()
        self._beside.wait_event(self._forked)
        with torch.cuda.stream(self._beside):
            yield
            self._joined.record()

    def join(self) -> None:
        """Have what is submitted from here on wait for the last that was submitted beside."""
        torch.cuda.current_stream(self.device).wait_event(self._joined)

    def plan_decode(self, wrappers: Wrappers, sequences: Sequence[SequenceSpan]) -> None:
        """Plan sequences of one token, for all kinds."""
        tables = make_tables(sequences, self.arena.block_size)
        block_ids = to_device(tables.block_ids, self.device)
        block_starts, last_lens = map(torch.from_numpy, (tables.block_starts, tables.last_lens))
        for kind, wrapper in wrappers.by_kind.items():
            wrapper.plan(
                block_starts,
                block_ids,
                last_lens,
                kind.num_heads,
                kind.num_kv_heads,
                kind.head_dim,
                self.arena.block_size,
                **self._options(kind, self.arena.storage.dtype),
            )

    @property
    def most_recorded_seqs(self) -> int:
        """See `RecordableBackend`."""
        return min(
            most_recorded_seqs(kind.num_heads, kind.num_kv_heads, kind.head_dim)
            for kind in self.kinds
        )

    @property
    def can_record_prompts(self) -> bool:
        """See `RecordableBackend`: the kernel for Hopper can."""
        if not self._can_use_hopper:
            return False
        return self.widens or self._takes_hopper_kernel(self.arena.storage.dtype)

    @property
    def widens(self) -> bool:
        """Whether recorded prompts attend to a copy in 16 bits; then `can_widen` limits them."""
        return self._widened is not None

    def can_widen(self, sequences: Sequence[SequenceSpan]) -> bool:
        """Whether there is a copy in 16 bits, with room for all that `sequences` attend to."""
        return self._widened is not None and self._widened.holds(sequences)

    def record_decode(
        self, inputs: Inputs, *, block_ids: torch.Tensor, scratch_block: int
    ) -> StaticDecode:
        """See `RecordableBackend`."""
        return StaticDecode(self, inputs, block_ids=block_ids, scratch_block=scratch_block)

    def record_mixed(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        block_ids: torch.Tensor,
        scratch_block: int,
    ) -> StaticMixed:
        """See `RecordableBackend`."""
        return StaticMixed(
            self,
            self._widened,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            block_ids=block_ids,
            scratch_block=scratch_block,
        )

    def plan_prefill(
        self,
        wrappers: Wrappers,
        sequences: Sequence[SequenceSpan],
        *,
        num_seqs: int = 0,
        first_row: int = 0,
        causal: bool = True,
    ) -> None:
        """Plan sequences of any number of tokens, for all kinds.

        Args:
            wrappers: those of a copy in 16 bits take what `can_widen` allows.
            sequences: their tokens are one after another.
            num_seqs: of recorded wrappers, how many they have; those beyond `sequences` are empty.
            first_row: where their tokens begin in the queries that the wrappers run with.
            causal: False where all have one token: another kernel, as fast as that for decodes.
        """
        tables = make_tables(sequences, self.arena.block_size, size=num_seqs, first_row=first_row)
        block_ids = to_device(tables.block_ids, self.device)
        widened = wrappers.widened
        if widened is not None:
            widened.plan(block_ids)
            block_ids = widened.places[: len(block_ids)]
        query_starts, block_starts, last_lens = map(
            torch.from_numpy, (tables.query_starts, tables.block_starts, tables.last_lens)
        )
        for kind, wrapper in wrappers.by_kind.items():
            wrapper.plan(
                query_starts,
                block_starts,
                block_ids,
                last_lens,
                kind.num_heads,
                kind.num_kv_heads,
                kind.head_dim,
                self.arena.block_size,
                causal=causal,
                max_token_per_sequence=most_query_tokens(sequences),
                **self._options(kind, self.arena.storage.dtype if widened is None else kind.dtype),
            )

    def wait_for_plan(self) -> None:
        """Block until the last plan is on the device, which it is as soon as its step begins."""
        self._planned.synchronize()

    def note_plan(self) -> None:
        """A plan was submitted."""
        self._planned.record()

    def _options(self, kind: AttentionKind, kv_dtype: torch.dtype) -> dict[str, Any]:
        return {
            "sm_scale": kind.scaling,
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kv_dtype,
        }


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """The kernels of a planned step; see `PlannedStep`.

    Attributes:
        num_decodes: how many of its tokens, the first ones, are decodes.
        num_tokens: of its sequences.
    """

    backend: FlashInferBackend
    decode: Wrappers
    prompts: Wrappers
    num_decodes: int
    num_tokens: int

    def run(
        self, layer: int, query: torch.Tensor, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `PlannedStep`; `query` is contiguous, and None makes an output."""
        backend, n, end = self.backend, self.num_decodes, self.num_tokens
        if output is None:
            output = torch.empty_like(query)
            output[end:] = 0  # of padding
        if end == 0:
            return output
        rows = query[:end], output[:end], backend.make_sums(layer, query[:end])
        decodes, prompts = _cut(rows, slice(0, n)), _cut(rows, slice(n, end))
        if n == 0:
            backend.attend(self.prompts, layer, *rows)
        elif n == end:
            backend.attend(self.decode, layer, *rows)
        else:
            with backend.beside():
                backend.attend(self.prompts, layer, *prompts)
            backend.attend(self.decode, layer, *decodes)
            backend.join()
        backend.finish(layer, *rows[1:], in_place=True)
        return output


def _cut(rows: Rows, part: slice) -> Rows:
    query, output, sums = rows
    return query[part], output[part], None if sums is None else sums[part]


class FlashInferAttention:
    """The attention of one step; implements `StepAttention`.

    Args:
        backend: has the cache.
        inputs: the step's tokens.
        run: attends once a layer's keys and values are stored.
    """

    def __init__(self, backend: FlashInferBackend, inputs: Inputs, run: Run) -> None:
        self._backend = backend
        self._inputs = inputs
        self._run = run

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """See `StepAttention`."""
        cache, inputs = self._backend.arena.layers[layer], self._inputs
        key_scale, value_scale = self._backend.arena.scales[layer]
        self._backend.store_kv(
            key,
            value,
            cache,
            inputs.blocks,
            inputs.offsets,
            key_scale=key_scale,
            value_scale=value_scale,
        )
        return self._run(layer, query.transpose(0, 1).contiguous())
