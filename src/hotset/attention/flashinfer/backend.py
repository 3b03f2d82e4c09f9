"""Paged attention by FlashInfer, on NVIDIA GPUs, straight from the block-major pool."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.flashinfer.build import why_not_built
from hotset.attention.flashinfer.kernels import (
    KernelBuild,
    has_hopper_kernel,
    start_kernels,
    use_paged_kernels,
)
from hotset.attention.flashinfer.widened import WidenedKV
from hotset.attention.inputs import Inputs, to_device
from hotset.attention.spec import LayerAttention
from hotset.errors import ModelError
from hotset.memory.arena import DeviceArena

_log = logging.getLogger(__name__)

_WORKSPACE_BYTES = 384 * 2**20
# With what two dozen wrappers of recorded steps keep their plans in, 8 MiB each.
WORKSPACE_BYTES = 2 * _WORKSPACE_BYTES + 24 * 8 * 2**20


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What FlashInfer plans for: layers that agree in this share a plan."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None
    dtype: torch.dtype  # of queries and outputs; that of the cache may be narrower


@dataclass(frozen=True, slots=True)
class _Tables:
    """Block tables as FlashInfer takes them: on the host, but for the ids of the blocks."""

    query_starts: torch.Tensor  # [R + 1] int32
    block_starts: torch.Tensor  # [R + 1] int32
    block_ids: torch.Tensor  # [sum of blocks] int32, on the device
    last_lens: torch.Tensor  # [R] int32, tokens in the last block


def _most_recorded_seqs(kind: AttentionKind) -> int:
    """As many as the workspace has room for the partial results of, which recorded steps have.

    By `PrefillPlan` of FlashInfer's `scheduler.cuh`: float32 numbers and a sum for each head and
    row of a tile, of which there is one a sequence and one for each so many rows of queries.
    """
    group = kind.num_heads // kind.num_kv_heads
    tile = next(rows for rows in (16, 64, 128) if rows >= min(group, 128))
    row_bytes = 4 * kind.num_heads * (kind.head_dim + 1)
    return int(_WORKSPACE_BYTES // (row_bytes * (tile + group)))


class FlashInferBackend:
    """Attention of one step after another; implements `AttentionBackend`.

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
        try:
            import flashinfer

            from hotset.kernels.store_kv import store_kv
        except (ImportError, OSError, RuntimeError) as error:
            raise ModelError(
                f"attention on an NVIDIA GPU needs flashinfer-python and triton ({error}); "
                "pip install 'hotset[cuda]'"
            ) from error
        self._flashinfer = flashinfer
        use_paged_kernels(flashinfer.prefill)
        self.store_kv = store_kv
        self.arena = arena
        self.device = arena.storage.device
        self.kinds = [
            AttentionKind(
                layer.num_heads,
                layer.cache.num_kv_heads,
                layer.cache.key_dim,
                layer.scaling,
                layer.cache.window,
                layer.softcap,
                layer.dtype,
            )
            for layer in layers
        ]
        # [num_blocks, block_size, H_kv, D] for each layer
        self.caches = list(zip(arena.keys, arena.values, strict=True))
        self.value_scales = [value_scale for _, value_scale in arena.scales]
        # Decodes run one after another, so all can use one, and prefills another; FlashInfer wants
        # zeros at first.
        self._workspace, self._prefill_workspace = torch.zeros(
            2, _WORKSPACE_BYTES, dtype=torch.uint8, device=self.device
        )
        self._beside = torch.cuda.Stream(self.device)
        self._forked, self._joined = torch.cuda.Event(), torch.cuda.Event()
        self._widened: WidenedKV | None = None
        self._is_widened = False  # the planned step's prompts
        self._decode = {  # a wrapper holds one plan
            kind: flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_tensor_cores=True, backend="fa2"
            )
            for kind in dict.fromkeys(self.kinds)
        }
        self._prefill = self._prefill_wrappers("fa2")
        self._prefill_widened: dict[AttentionKind, Any] = {}
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
            self._prefill = self._prefill_wrappers("auto")
            self._prefill_widened = self._prefill_wrappers("auto") if self.widens else {}
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
        try:
            self.plan_decode(self._decode, [one])
            self.plan_prefill(self._prefill, [one])
            if self.widens:
                self.plan_prefill(self._prefill_widened, [one], is_widened=True)
            self.store_kv(token, token, cache, zero + scratch_block, zero)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler that is not there makes of it
            reason = why_not_built(error, torch.version.cuda)
            raise ModelError(
                f"FlashInfer cannot build its attention kernels, which eager steps need too: "
                f"{reason}"
            ) from error
        self.note_plan()

    def _prefill_wrappers(self, backend: str) -> dict[AttentionKind, Any]:
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper
        return {
            kind: wrapper(self._prefill_workspace, "NHD", backend=backend)
            for kind in dict.fromkeys(self.kinds)
        }

    def _make_widened(self) -> WidenedKV | None:
        """Where the kernel for Hopper is to attend to an 8-bit cache."""
        dtype, kv_dtype = self.kinds[0].dtype, self.arena.storage.dtype
        if self._takes_hopper_kernel(kv_dtype) or not self._takes_hopper_kernel(dtype):
            return None
        return WidenedKV(self.arena, dtype)

    def _takes_hopper_kernel(self, kv_dtype: torch.dtype) -> bool:
        return has_hopper_kernel(self.device, self.kinds[0].dtype, kv_dtype)

    def begin_step(self, batch: Batch, inputs: Inputs) -> "FlashInferAttention":
        """Plan the step's attention; the result is good until the next plan."""
        self.plan(batch)
        return FlashInferAttention(self, inputs, self.run)

    def plan(self, batch: Batch) -> None:
        """Tell the kernels where the step's sequences are; `run` is for that step then."""
        self.wait_for_plan()
        sequences, n = batch.sequences, batch.num_decodes
        self._num_decodes, self._num_tokens = n, batch.num_tokens
        if n:
            self.plan_decode(self._decode, sequences[:n])
        if n < len(sequences):
            self._is_widened = self.can_widen(sequences[n:])
            wrappers = self._prefill_widened if self._is_widened else self._prefill
            self.plan_prefill(wrappers, sequences[n:], is_widened=self._is_widened)
        self.note_plan()

    def run(
        self, layer: int, query: torch.Tensor, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend for the planned step's tokens.

        Args:
            layer: whose cache, with the step's keys and values in it.
            query: `[T or more, H, D]`, contiguous; rows beyond the step's T are left out.
            output: like `query`; None makes one.
        """
        output = torch.empty_like(query) if output is None else output
        n, end = self._num_decodes, self._num_tokens
        if n == 0:
            self._run_prefill(layer, query[:end], output[:end])
        elif n == end:
            self.attend(self._decode, layer, query[:n], output[:n])
        else:
            with self.beside():
                self._run_prefill(layer, query[n:end], output[n:end])
            self.attend(self._decode, layer, query[:n], output[:n])
            self.join()
        if self.value_scales[layer] != 1:
            output[:end].mul_(self.value_scales[layer])
        return output

    def _run_prefill(self, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        wrappers = self._prefill_widened if self._is_widened else self._prefill
        self.attend(wrappers, layer, query, output, is_widened=self._is_widened)

    def attend(
        self,
        wrappers: dict[AttentionKind, Any],
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        *,
        is_widened: bool = False,
    ) -> None:
        """Run a layer's kernel as `wrappers` are planned, from `query` to `output`, `[T, H, D]`.

        The result is still to be multiplied by the layer's `value_scales`: FlashInfer would do that
        to all rows of `output`, also those that another kernel fills meanwhile.
        """
        cache = self.caches[layer]
        if is_widened:
            assert self._widened is not None
            cache = self._widened.widen(layer)
        key_scale = self.arena.scales[layer][0]
        wrappers[self.kinds[layer]].run(
            query, cache, out=output, k_scale=None if key_scale == 1 else key_scale
        )

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

    def plan_decode(
        self, wrappers: dict[AttentionKind, Any], sequences: Sequence[SequenceSpan]
    ) -> None:
        """Plan sequences of one token, for all kinds."""
        tables = _make_tables(sequences, self.arena.block_size, self.device)
        for kind, wrapper in wrappers.items():
            wrapper.plan(
                tables.block_starts,
                tables.block_ids,
                tables.last_lens,
                kind.num_heads,
                kind.num_kv_heads,
                kind.head_dim,
                self.arena.block_size,
                **self._options(kind),
            )

    def decode_wrappers(self, size: int, block_ids: torch.Tensor) -> dict[AttentionKind, Any]:
        """A wrapper for each kind that plans `size` sequences into memory of its own."""
        return {
            kind: self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                backend="fa2",  # "auto" is another one from version to version
                paged_kv_indptr_buffer=torch.zeros(size + 1, dtype=torch.int32, device=self.device),
                paged_kv_indices_buffer=block_ids,
                paged_kv_last_page_len_buffer=torch.ones(
                    size, dtype=torch.int32, device=self.device
                ),
            )
            for kind in dict.fromkeys(self.kinds)
        }

    @property
    def most_recorded_seqs(self) -> int:
        """Sequences of one token that a recorded step can have at most."""
        return min(map(_most_recorded_seqs, self.kinds))

    @property
    def can_record_prompts(self) -> bool:
        """Whether the kernel for prompts is one whose launch does not depend on the plan."""
        if not self._can_use_hopper:
            return False
        return self.widens or self._takes_hopper_kernel(self.arena.storage.dtype)

    @property
    def widens(self) -> bool:
        """Whether recorded prompts attend to a copy in 16 bits; then `can_widen` limits them."""
        return self._widened is not None

    def can_widen(self, sequences: Sequence[SequenceSpan]) -> bool:
        """Whether there is a copy in 16 bits, with room for all that `sequences` attend to."""
        if self._widened is None:
            return False
        size = self.arena.block_size
        return sum(-(-seq.context_len // size) for seq in sequences) <= self._widened.num_blocks

    def mixed_wrappers(
        self, num_seqs: int, block_ids: torch.Tensor, *, is_prompts: bool
    ) -> dict[AttentionKind, Any]:
        """A wrapper for each kind that plans up to `num_seqs` sequences into memory of its own."""

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self.device)

        return {
            kind: self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._prefill_workspace if is_prompts else self._workspace,
                "NHD",
                use_cuda_graph=True,
                qo_indptr_buf=zeros(num_seqs + 1),
                paged_kv_indptr_buf=zeros(num_seqs + 1),
                paged_kv_indices_buf=block_ids,
                paged_kv_last_page_len_buf=zeros(num_seqs),
                backend="fa3" if is_prompts else "fa2",
            )
            for kind in dict.fromkeys(self.kinds)
        }

    def plan_prefill(
        self,
        wrappers: dict[AttentionKind, Any],
        sequences: Sequence[SequenceSpan],
        *,
        num_seqs: int = 0,
        first_row: int = 0,
        causal: bool = True,
        is_widened: bool = False,
    ) -> None:
        """Plan sequences of any number of tokens, for all kinds.

        Args:
            wrappers: by kind.
            sequences: their tokens are one after another.
            num_seqs: of `mixed_wrappers`, which have so many; those beyond `sequences` are empty.
            first_row: where their tokens begin in the queries that `run` gets.
            causal: False where all have one token: another kernel, as fast as that for decodes.
            is_widened: whether they attend to a copy in 16 bits, which `can_widen` has to allow.
        """
        tables = _make_tables(sequences, self.arena.block_size, self.device, size=num_seqs)
        block_ids = tables.block_ids
        if is_widened:
            assert self._widened is not None
            self._widened.plan(block_ids)
            block_ids = self._widened.places[: len(block_ids)]
        for kind, wrapper in wrappers.items():
            wrapper.plan(
                tables.query_starts + first_row,
                tables.block_starts,
                block_ids,
                tables.last_lens,
                kind.num_heads,
                kind.num_kv_heads,
                kind.head_dim,
                self.arena.block_size,
                causal=causal,
                max_token_per_sequence=max((seq.num_tokens for seq in sequences), default=0),
                **self._options(kind, is_widened=is_widened),
            )

    def wait_for_plan(self) -> None:
        """Block until the last plan is on the device, which it is as soon as its step begins."""
        self._planned.synchronize()

    def note_plan(self) -> None:
        """A plan was submitted."""
        self._planned.record()

    def _options(self, kind: AttentionKind, *, is_widened: bool = False) -> dict[str, Any]:
        return {
            "sm_scale": kind.scaling,
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.softcap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.dtype if is_widened else self.arena.storage.dtype,
        }


def _make_tables(
    sequences: Sequence[SequenceSpan], block_size: int, device: torch.device, *, size: int = 0
) -> _Tables:
    """The block tables of `sequences`, one after another, then empty ones up to `size` in all."""
    block_ids: list[int] = []
    size = max(size, len(sequences))
    queries, num_blocks, last_lens = np.zeros((3, size), np.int32)
    for i, seq in enumerate(sequences):
        num_blocks[i] = -(-seq.context_len // block_size)
        queries[i] = seq.num_tokens
        last_lens[i] = (seq.context_len - 1) % block_size + 1
        block_ids += seq.block_table
    return _Tables(
        _starts(queries),
        _starts(num_blocks),
        to_device(np.array(block_ids, np.int32), device),
        torch.from_numpy(last_lens),
    )


def _starts(counts: np.ndarray) -> torch.Tensor:
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return torch.from_numpy(starts)


class FlashInferAttention:
    """The attention of one step; implements `StepAttention`.

    Args:
        backend: has the cache.
        inputs: the step's tokens.
        run: layer, `[T, H, D]` queries -> `[T, H, D]`, once the layer's keys and values are stored.
    """

    def __init__(
        self,
        backend: FlashInferBackend,
        inputs: Inputs,
        run: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        self._backend = backend
        self._inputs = inputs
        self._run = run

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
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
