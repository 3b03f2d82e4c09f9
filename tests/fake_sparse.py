"""Sparse attention as a GPU runs it, on the CPU: kernels are fakes that compute by PyTorch.

What is recorded computes when it is replayed, from what the tensors hold then: see
`fake_flashinfer`.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from fake_flashinfer import do
from fake_latents import _Latents, _store_latent

from hotset.attention.flashinfer.sparse import SparseBackend
from hotset.attention.hot_rows import HotRows
from hotset.attention.sparse.drawn import DrawnSelection
from hotset.attention.sparse.rounded import store_keys, turned_query, widen_keys
from hotset.attention.sparse.select import score_keys, select_positions
from hotset.attention.spec import LayerAttention
from hotset.cost.cache_spec import KEYS_ALONE
from hotset.kernels.index_scores import PagedTokens
from hotset.memory.arena import DeviceArena


def _score_paged_keys(
    query: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    tokens: PagedTokens,
    scores: torch.Tensor,
    *,
    count: int,
    key_scales: torch.Tensor | None = None,
) -> None:
    size = keys.shape[1]
    for i, (start, length) in enumerate(
        zip(tokens.starts.tolist(), tokens.lengths.tolist(), strict=True)
    ):
        if length > count:
            blocks = tokens.block_ids[start : start + -(-length // size)].long()
            blocks &= ~KEYS_ALONE
            own = keys[blocks] if key_scales is None else widen_keys(keys, key_scales, blocks)
            own = own.flatten(0, 1)[:length]
            scores[i, :length] = score_keys(query[i, None], weights[i, None], own)[0]


def _store_index(
    query: torch.Tensor,
    key: torch.Tensor,
    turned: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    store_keys(key, keys, scales, (blocks, offsets))
    turned.copy_(turned_query(query))


def _find_rows(
    positions: torch.Tensor,
    tokens: PagedTokens,
    rows: torch.Tensor,
    *,
    block_size: int,
    rows_per_block: int,
    rows_per_token: int,
) -> None:
    places = positions.clamp(min=0)
    blocks = tokens.block_ids[(tokens.starts[:, None] + places // block_size).long()]
    found = blocks * rows_per_block + places % block_size * rows_per_token
    rows.copy_(found.masked_fill((positions < 0) | (blocks >= KEYS_ALONE), -1))


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
    def run(*arguments: Any, **options: Any) -> None:
        do(lambda: kernel(*arguments, **options))

    return run


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
        drawn: DrawnSelection | None = None,
    ) -> None:
        kernels = SimpleNamespace(
            PagedTokens=PagedTokens,
            score_paged_keys=_recorded(_score_paged_keys),
            find_rows=_recorded(_find_rows),
        )
        self._select_with(_top_k, kernels, max_context, hot, drawn)
        self.store_latent = _store_latent
        self.store_index = _recorded(_store_index)
        self._wrapper_class, self._kernels = _Latents, None
        self._set_up(arena, layers, workspace_bytes=1)
        self._most_rows = most_rows

    def wait_for_plan(self) -> None:
        """There is nothing to wait for."""

    def note_plan(self) -> None:
        """There is nothing to note."""
