"""Attention of long prompts over keys and values that are made of latents, piece by piece.

Of each token of a piece and each head one row is made, `[rotary key | key | value]`: a kernel
copies the rotary keys as it gathers the latents, and one product writes the rest beside them.
FlashInfer reads keys and values as views of the rows. So of a piece each number is written once and
read once, and nothing is copied. Queries have their rotary part first, too: the order of numbers
does not change a product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hotset.attention.flashinfer.long_prompts import LongPrompt, Piece
from hotset.attention.inputs import to_device
from hotset.attention.latent import LatentWeights
from hotset.attention.spec import LayerAttention


@dataclass(frozen=True, slots=True)
class ExpandedKernels:
    """What runs beside products.

    Attributes:
        wrapper: FlashInfer's `BatchPrefillWithRaggedKVCacheWrapper`.
        gather: `kernels.gather_latents`.
        merge: `kernels.merge_states`.
    """

    wrapper: Any
    gather: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor], None]
    merge: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A long prompt of a step, planned.

    Attributes:
        rows: of the step.
        block_table: `[n]` int32, of the whole context.
        pieces: each with the wrapper that is planned for its size.
    """

    rows: slice
    block_table: torch.Tensor
    pieces: list[tuple[Any, Piece]]


class ExpandedPrompts:
    """Plans long prompts and attends to what they see.

    Pieces of one size of one prompt share a plan, and all layers do, so that a step has at most
    three plans per prompt.

    Args:
        kernels: see there.
        workspace: for all wrappers, which run one after another.
        asked: what each layer asks for.
        piece_tokens: most tokens of a piece.
    """

    def __init__(
        self,
        kernels: ExpandedKernels,
        workspace: torch.Tensor,
        asked: LayerAttention,
        *,
        piece_tokens: int,
    ) -> None:
        self.kernels, self.piece_tokens = kernels, piece_tokens
        self._workspace, self._asked = workspace, asked
        self._wrappers: list[Any] = []
        self._made: torch.Tensor | None = None  # `[S, H, D + D_v]`, for one piece after another

    def plan(self, prompts: Sequence[LongPrompt]) -> list[PlannedPrompt]:
        """Plan the long prompts of a step; good until the next call.

        Copies to the device from memory of the wrappers: the last plan is to be there already.
        """
        planned, num_used = [], 0
        for prompt in prompts:
            wrappers: dict[tuple[int, bool], Any] = {}
            pieces = []
            for piece in prompt.pieces:
                kind = piece.num_tokens, piece.is_causal
                if kind not in wrappers:
                    wrappers[kind] = self._planned(num_used, prompt.num_tokens, piece)
                    num_used += 1
                pieces.append((wrappers[kind], piece))
            blocks = to_device(np.asarray(prompt.block_table, np.int32), self._workspace.device)
            planned.append(PlannedPrompt(prompt.rows, blocks, pieces))
        return planned

    def _planned(self, index: int, num_queries: int, piece: Piece) -> Any:
        if index == len(self._wrappers):
            wrapper = self.kernels.wrapper(self._workspace, "NHD", backend="fa3")
            self._wrappers.append(wrapper)
        heads, asked = self._asked.heads, self._asked
        self._wrappers[index].plan(
            torch.tensor([0, num_queries], dtype=torch.int32),
            torch.tensor([0, piece.num_tokens], dtype=torch.int32),
            asked.num_heads,
            asked.num_heads,
            heads.key_dim,
            heads.value_dim,
            causal=piece.is_causal,
            sm_scale=asked.scaling,
            q_data_type=asked.dtype,
            kv_data_type=asked.dtype,
        )
        return self._wrappers[index]

    def attend(
        self,
        prompt: PlannedPrompt,
        weights: LatentWeights,
        cache: torch.Tensor,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attend from the prompt's queries to a layer's rows.

        Args:
            prompt: of the last plan.
            weights: the layer's.
            cache: `[num_blocks, block_size, R + P]`, with the step's own rows.
            query: `[H, T, D]`.
            output: `[T, H, D_v]`, contiguous. Mutated.
        """
        asked = _rotary_first(query, weights.nope_dim)
        sums = torch.empty(asked.shape[:2], dtype=torch.float32, device=query.device)
        place, place_sums = output, sums
        for index, (wrapper, piece) in enumerate(prompt.pieces):
            keys, values = self.expand(piece, prompt.block_table, weights, cache)
            if index == 1:
                place, place_sums = torch.empty_like(output), torch.empty_like(sums)
            wrapper.run(asked, keys, values, out=place, lse=place_sums, return_lse=True)
            if index:
                self.kernels.merge(output, sums, place, place_sums)

    def expand(
        self,
        piece: Piece,
        block_table: torch.Tensor,
        weights: LatentWeights,
        cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[S, H, D]`, rotary part first, and values `[S, H, D_v]`; good until the next call.

        Args:
            piece: S tokens of a context.
            block_table: `[n]` int32, of the whole context.
            weights: the layer's.
            cache: as for `attend`.
        """
        heads = self._asked.heads
        rank = weights.heads.shape[-1]
        if self._made is None:
            shape = (self.piece_tokens, heads.num_kv_heads, heads.key_dim + heads.value_dim)
            self._made = cache.new_empty(shape)
        made = self._made[: piece.num_tokens]
        latents = cache.new_empty(piece.num_tokens, rank)
        self.kernels.gather(cache, block_table, piece.first, latents, made)
        rope_dim = heads.key_dim - weights.nope_dim
        torch.bmm(
            latents.expand(heads.num_kv_heads, -1, -1),
            weights.heads.transpose(1, 2),
            out=made[..., rope_dim:].transpose(0, 1),
        )
        return made[..., : heads.key_dim], made[..., heads.key_dim :]


def _rotary_first(query: torch.Tensor, nope_dim: int) -> torch.Tensor:
    """`[T, H, D]` of `[H, T, D]`, with the last `D - nope_dim` numbers first."""
    num_heads, num_tokens, width = query.shape
    asked = query.new_empty(num_tokens, num_heads, width)
    asked[..., : width - nope_dim] = query[..., nope_dim:].transpose(0, 1)
    asked[..., width - nope_dim :] = query[..., :nope_dim].transpose(0, 1)
    return asked
