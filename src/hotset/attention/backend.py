"""What makes the attention of a step, whichever kernels it runs."""

from typing import Protocol

import torch

from hotset.attention.batch import Batch
from hotset.attention.inputs import Inputs


class StepAttention(Protocol):
    """Attention of all tokens of one step, layer by layer."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Store a layer's new keys and values, then attend as the layer's `LayerAttention` says.

        T = tokens of the step, H = heads, D = width of a key, D_v = width of a value.

        Args:
            layer: index of the layer.
            query: `[H, T, D]`.
            key: `[H_kv, T, D]`.
            value: `[H_kv, T, D_v]`.

        Returns:
            `[T, H, D_v]`.
        """
        ...


class AttentionBackend(Protocol):
    """Makes the attention of one step after another."""

    def begin_step(self, batch: Batch, inputs: Inputs) -> StepAttention:
        """The attention of a step; good until the next call."""
        ...
