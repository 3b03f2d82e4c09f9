"""Sparse attention as a GPU runs it, on the CPU: our kernels interpreted, FlashInfer's as fakes."""

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from fake_flashinfer import do
from fake_latents import _Latents, _store_latent

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.attention.hot_rows import HotRows
from hotset.attention.sparse.select import select_positions
from hotset.attention.spec import LayerAttention
from hotset.kernels import index_scores
from hotset.memory.arena import DeviceArena


def _top_k(
    scores: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    count: int,
    *,
    deterministic: bool,
    tie_break: int,
) -> torch.Tensor:
    """FlashInfer's `top_k_ragged_transform`."""
    assert deterministic and tie_break == 1 and not offsets.any()
    assert scores.is_contiguous() and scores.shape[1] % 4 == 0
    selected = lengths.new_zeros(len(scores), count)
    do(lambda: selected.copy_(select_positions(scores, lengths, count)))
    return selected


def _recorded(kernel: Callable[..., None]) -> Callable[..., None]:
    return lambda *arguments, **options: do(lambda: kernel(*arguments, **options))


class CpuSparse(SparseBackend):
    """`SparseBackend` over fakes; `most_rows` is what a plan has room for."""

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        *,
        max_context: int,
        most_rows: int = 256,
        hot: HotRows | None = None,
    ) -> None:
        kernels = SimpleNamespace(
            PagedTokens=index_scores.PagedTokens,
            score_paged_keys=_recorded(index_scores.score_paged_keys),
            find_rows=_recorded(index_scores.find_rows),
        )
        self._select_with(_top_k, kernels, max_context, hot)
        self.store_latent = _store_latent
        self._wrapper_class, self._kernels = _Latents, None
        self._set_up(arena, layers, workspace_bytes=1)
        self._most_rows = most_rows

    def wait_for_plan(self) -> None:
        """There is nothing to wait for."""

    def note_plan(self) -> None:
        """There is nothing to note."""
