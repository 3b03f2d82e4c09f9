"""FlashInfer and CUDA graphs on the CPU: wrappers that attend as they are planned, and tapes.

A wrapper of a recorded step keeps its plan where FlashInfer does, in the buffers that it was given:
a plan that does not fit, or a buffer that another plan has overwritten, shows. A tape notes the
operations that are recorded and runs them again over the same tensors.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hotset.attention.flashinfer.backend import FlashInferBackend
from hotset.attention.flashinfer.widened import WidenedKV
from hotset.attention.flashinfer.wrappers import WrapperMaker, kind_of
from hotset.attention.spec import LayerAttention
from hotset.linear.fp8 import FP8, to_fp8
from hotset.memory.arena import DeviceArena

tapes: list["Tape"] = []  # of the recording under way


class Tape(TorchDispatchMode):
    """A recorded piece of work, in place of a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self._work: list[Callable[[], Any]] = []
        self.num_replays = 0

    def note(self, work: Callable[[], Any]) -> None:
        """Have `replay` do `work` at this place."""
        self._work.append(work)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_place(tensor) for tensor in _tensors([*args, *(kwargs or {}).values()])}

        def again() -> None:
            made = func(*args, **(kwargs or {}))
            for target, value in zip(*map(_tensors, (found, made)), strict=True):
                if _place(target) not in given:  # else a view, or in place
                    target.copy_(value)

        self.note(again)
        return found

    def replay(self) -> None:
        """Do it once more."""
        assert self not in tapes, "a tape that is being recorded"
        self.num_replays += 1
        for work in self._work:
            work()

    def reset(self) -> None:
        """Forget what it does."""
        self._work.clear()


def do(work: Callable[[], Any]) -> None:
    """Do `work`, which is in place; while it is recorded, do it when it is replayed."""
    if tapes:
        tapes[-1].note(work)
    else:
        work()


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, tuple | list):
        return [tensor for part in found for tensor in _tensors(part)]
    return [found] if isinstance(found, torch.Tensor) else []


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class FakeRecorder:
    """Records `Tape`s in place of CUDA graphs; see `GraphRecorder`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def between_steps(self) -> Any:
        """See `GraphRecorder`."""
        return nullcontext()

    @contextmanager
    def recording(self, graphs: list[Tape]) -> Iterator[None]:
        """See `GraphRecorder`."""
        self._begin(graphs)
        try:
            yield
        finally:
            self._end()

    def cut(self, graphs: list[Tape]) -> None:
        """See `GraphRecorder`."""
        self._end()
        self._begin(graphs)

    def seconds(self, graphs: Sequence[Tape]) -> float:
        """One: all sizes are as fast."""
        for graph in graphs:
            graph.replay()
        return 1.0

    def _begin(self, graphs: list[Tape]) -> None:
        tapes.append(Tape())
        graphs.append(tapes[-1])
        tapes[-1].__enter__()

    def _end(self) -> None:
        tapes.pop().__exit__(None, None, None)


class _Wrapper:
    """Attends as `plan` says; one of `use_cuda_graph` plans into its buffers."""

    def __init__(
        self,
        workspace: torch.Tensor,
        layout: str,
        *,
        backend: str,
        use_cuda_graph: bool = False,
        **buffers: Any,
    ) -> None:
        assert layout == "NHD" and backend in ("auto", "fa2", "fa3")
        self._is_static = use_cuda_graph
        self._buffers = buffers

    def _plan(
        self,
        names: Sequence[str],
        tables: Sequence[torch.Tensor],
        block_size: int,
        **options: Any,
    ) -> None:
        self._block_size, self._options = block_size, options
        self._num_queries = int(tables[0][-1])
        if not self._is_static:
            self._tables = [table.clone() for table in tables]
            return
        self._tables = []
        for name, table in zip(names, tables, strict=True):
            buffer = self._buffers[name]
            if "indices" in name:  # as many as the sequences have, up to what there is room for
                assert len(table) <= len(buffer), f"{len(table)} blocks in {len(buffer)}"
            else:
                assert len(table) == len(buffer), "a recorded plan has one size"
            buffer[: len(table)].copy_(table)
            self._tables.append(buffer)

    def run(
        self,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor,
        k_scale: float | None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> None:
        """Attend from `[T, H, D]` to `out`; what is recorded reads the plan when replayed.

        T is what was planned, which FlashInfer 0.6.12 checks too.
        """
        assert len(query) == self._num_queries, f"{len(query)} queries, {self._num_queries} planned"
        assert out.shape == query.shape
        assert return_lse == (lse is not None) and (lse is None or lse.shape == query.shape[:2])

        def attend() -> None:
            self._attend(query, cache, out, k_scale or 1.0, lse)

        do(attend)

    def _attend(
        self,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        k_scale: float,
        lse: torch.Tensor | None,
    ) -> None:
        queries, starts, block_ids, last_lens = (table.tolist() for table in self._tables)
        for i, last_len in enumerate(last_lens):
            first, end = queries[i], queries[i + 1]
            if first == end:
                continue
            blocks = block_ids[starts[i] : starts[i + 1]]
            context = (len(blocks) - 1) * self._block_size + last_len
            keys, values = (_rows(part, blocks)[:context] for part in cache)
            attended, sums = self._one(query[first:end], keys * k_scale, values)
            out[first:end] = attended.to(out.dtype)
            if lse is not None:
                lse[first:end] = sums

    def _one(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))  # [S, H, D]
        scores = torch.einsum("qhd,shd->hqs", query.float(), keys) * self._options["sm_scale"]
        if softcap := self._options["logits_soft_cap"]:
            scores = softcap * torch.tanh(scores / softcap)
        num_queries, context = len(query), len(keys)
        behind = torch.arange(context - num_queries, context)[:, None] - torch.arange(context)
        is_seen = torch.ones_like(behind, dtype=torch.bool)
        if self._options.get("causal", False):
            is_seen &= behind >= 0
        if (window := self._options["window_left"]) >= 0:
            is_seen &= behind <= window
        scores = scores.masked_fill(~is_seen, -torch.inf)
        sums = scores.logsumexp(-1).t() / math.log(2)
        return torch.einsum("hqs,shd->qhd", scores.softmax(-1), values), sums


def _rows(cache: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    """`[S, H, D]` float32 of the blocks of `[N, block_size, H, D]`."""
    if cache.dtype == FP8:  # moved as bytes: not every indexing operation knows 8-bit floats
        return cache.view(torch.uint8)[blocks].view(FP8).float().flatten(0, 1)
    return cache[blocks].float().flatten(0, 1)


def _widen_kv(cache: torch.Tensor, block_ids: torch.Tensor, target: torch.Tensor) -> None:
    """Convert blocks, as `kernels.widen_kv` does; what is recorded reads `block_ids` later."""

    def widen() -> None:
        for place, block in enumerate(block_ids.tolist()):
            if block >= 0:
                target[place] = cache[block].to(target.dtype)

    do(widen)


class _Decode(_Wrapper):
    def plan(
        self,
        block_starts: torch.Tensor,
        block_ids: torch.Tensor,
        last_lens: torch.Tensor,
        *shape: int,
        **options: Any,
    ) -> None:
        names = [f"paged_kv_{x}_buffer" for x in ("indptr", "indices", "last_page_len")]
        self._plan(names, [block_starts, block_ids, last_lens], shape[-1], **options)
        self._tables.insert(0, torch.arange(len(block_starts)))
        self._num_queries = len(last_lens)


class _Prefill(_Wrapper):
    def plan(
        self,
        query_starts: torch.Tensor,
        block_starts: torch.Tensor,
        block_ids: torch.Tensor,
        last_lens: torch.Tensor,
        *shape: int,
        max_token_per_sequence: int,
        **options: Any,
    ) -> None:
        longest = int(query_starts.diff().max()) if len(query_starts) > 1 else 0
        assert max_token_per_sequence == longest
        names = ["qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf"]
        names.append("paged_kv_last_page_len_buf")
        self._plan(names, [query_starts, block_starts, block_ids, last_lens], shape[-1], **options)


def _store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    *,
    key_scale: float,
    value_scale: float,
) -> None:
    for i, (new, scale) in enumerate(((key, key_scale), (value, value_scale))):
        part = cache[:, i]
        if part.dtype != new.dtype:
            part, new = part.view(torch.uint8), to_fp8(new, scale).view(torch.uint8)
        part[blocks, offsets] = new.transpose(0, 1)


def _leave_to_sinks(
    output: torch.Tensor,
    sums: torch.Tensor,
    sinks: torch.Tensor,
    target: torch.Tensor,
    *,
    scale: float,
) -> None:
    share = torch.sigmoid(sums * math.log(2) - sinks.float()).unsqueeze(-1)
    target.copy_((output.float() * share * scale).to(output.dtype))


class CpuFlashInfer(FlashInferBackend):
    """`FlashInferBackend` over fakes, with all kernels built.

    Args:
        widened_blocks: of the copy that prompts attend to in place of an 8-bit cache; 0: none.
        records_prompts: whether the kernel for prompts can be recorded, as on Hopper.
        most_recorded_seqs: see `RecordableBackend`; there is no workspace to hold more.
    """

    most_recorded_seqs = 0

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        *,
        records_prompts: bool,
        widened_blocks: int = 0,
        most_recorded_seqs: int = 256,
    ) -> None:
        self.most_recorded_seqs = most_recorded_seqs
        library = SimpleNamespace(
            BatchDecodeWithPagedKVCacheWrapper=_decode,
            BatchPrefillWithPagedKVCacheWrapper=_Prefill,
        )
        self.store_kv, self.leave_to_sinks = _store_kv, _leave_to_sinks
        self.arena, self.device = arena, arena.storage.device
        self.kinds = [kind_of(layer) for layer in layers]
        self.caches = [layer.unbind(1) for layer in arena.layers]
        self.value_scales = [value_scale for _, value_scale in arena.scales]
        self.sinks = [layer.sinks for layer in layers]
        kinds = list(dict.fromkeys(self.kinds))
        self.make = WrapperMaker(library, kinds, self.device, workspace_bytes=1)
        self._decode, self._prefill = self.make.decodes(), self.make.prompts("auto")
        self._widened, self._prefill_widened = None, None
        if widened_blocks:
            dtype = self.kinds[0].dtype
            num_bytes = widened_blocks * max(x[0].numel() for x in arena.layers) * dtype.itemsize
            self._widened = WidenedKV(arena, dtype, num_bytes=num_bytes, kernel=_widen_kv)
            self._prefill_widened = self.make.prompts("auto", self._widened)
        self.is_complete, self._can_use_hopper = True, records_prompts

    def _takes_hopper_kernel(self, kv_dtype: torch.dtype) -> bool:
        return True

    def beside(self) -> Any:
        """On the CPU, before."""
        return nullcontext()

    def join(self) -> None:
        """There is nothing to wait for."""

    def wait_for_plan(self) -> None:
        """There is nothing to wait for."""

    def note_plan(self) -> None:
        """There is nothing to wait for."""


def _decode(workspace: torch.Tensor, layout: str, **options: Any) -> _Decode:
    assert options.pop("use_tensor_cores")
    return _Decode(workspace, layout, **options)
