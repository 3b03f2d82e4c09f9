"""FlashInfer's wrappers, each of which holds one plan: one per kind of layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hotset.attention.flashinfer.widened import WidenedKV
from hotset.attention.spec import LayerAttention
from hotset.cost.workspace import KERNEL_WORKSPACE_BYTES


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


def kind_of(layer: LayerAttention) -> AttentionKind:
    """The kind of a layer that FlashInfer can run: its keys and values are of one width."""
    cache = layer.heads
    return AttentionKind(
        layer.num_heads,
        cache.num_kv_heads,
        cache.key_dim,
        layer.scaling,
        cache.window,
        layer.softcap,
        layer.dtype,
    )


@dataclass(frozen=True, slots=True)
class Wrappers:
    """The plans of one part of a step.

    Attributes:
        by_kind: FlashInfer's wrapper for each kind.
        widened: the copy in 16 bits that they attend to; None: the cache itself.
    """

    by_kind: dict[AttentionKind, Any]
    widened: WidenedKV | None = None


class WrapperMaker:
    """Makes wrappers over two workspaces.

    Decodes run one after another, so that all can use one, and prompts the other.

    Args:
        flashinfer: the library.
        kinds: of the layers, each once.
        device: that they run on.
        workspace_bytes: of each workspace.
    """

    def __init__(
        self,
        flashinfer: Any,
        kinds: Sequence[AttentionKind],
        device: torch.device,
        *,
        workspace_bytes: int = KERNEL_WORKSPACE_BYTES,
    ) -> None:
        self._decode_class = flashinfer.BatchDecodeWithPagedKVCacheWrapper
        self._prefill_class = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._kinds = kinds
        self._device = device
        # FlashInfer wants zeros at first.
        self._workspace, self._prefill_workspace = torch.zeros(
            2, workspace_bytes, dtype=torch.uint8, device=device
        )

    def decodes(self) -> Wrappers:
        """For sequences of one token."""
        return Wrappers(
            {
                kind: self._decode_class(
                    self._workspace, "NHD", use_tensor_cores=True, backend="fa2"
                )
                for kind in self._kinds
            }
        )

    def prompts(self, backend: str, widened: WidenedKV | None = None) -> Wrappers:
        """For sequences of any number of tokens, by the kernels of FlashInfer's `backend`."""
        return Wrappers(
            {
                kind: self._prefill_class(self._prefill_workspace, "NHD", backend=backend)
                for kind in self._kinds
            },
            widened,
        )

    def recorded_decodes(self, size: int, block_ids: torch.Tensor) -> Wrappers:
        """For `size` sequences of one token, planned into memory of their own."""
        return Wrappers(
            {
                kind: self._decode_class(
                    self._workspace,
                    "NHD",
                    use_cuda_graph=True,
                    use_tensor_cores=True,
                    backend="fa2",  # "auto" is another one from version to version
                    paged_kv_indptr_buffer=self._zeros(size + 1),
                    paged_kv_indices_buffer=block_ids,
                    paged_kv_last_page_len_buffer=self._zeros(size) + 1,
                )
                for kind in self._kinds
            }
        )

    def recorded_mixed(
        self,
        num_seqs: int,
        block_ids: torch.Tensor,
        *,
        is_prompts: bool,
        widened: WidenedKV | None = None,
    ) -> Wrappers:
        """For up to `num_seqs` sequences, planned into memory of their own.

        `is_prompts` tells sequences of any number of tokens from those of one.
        """
        return Wrappers(
            {
                kind: self._prefill_class(
                    self._prefill_workspace if is_prompts else self._workspace,
                    "NHD",
                    use_cuda_graph=True,
                    qo_indptr_buf=self._zeros(num_seqs + 1),
                    paged_kv_indptr_buf=self._zeros(num_seqs + 1),
                    paged_kv_indices_buf=block_ids,
                    paged_kv_last_page_len_buf=self._zeros(num_seqs),
                    backend="fa3" if is_prompts else "fa2",
                )
                for kind in self._kinds
            },
            widened,
        )

    def _zeros(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self._device)
