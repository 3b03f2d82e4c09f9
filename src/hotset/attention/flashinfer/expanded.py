"""Attention of long prompts over keys and values that are made of latents, piece by piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from hotset.attention.flashinfer.long_prompts import LongPrompt, Piece
from hotset.attention.inputs import to_device
from hotset.attention.latent import LatentWeights
from hotset.attention.spec import LayerAttention

# See `kernels.merge_states`.
Merge: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Planned:
    """A piece, the wrapper that is planned for its size, and where its rows are.

    Attributes:
        blocks: `[S]` int64.
        offsets: `[S]` int64.
    """

    wrapper: Any
    blocks: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A long prompt of a step, planned."""

    rows: slice
    pieces: list[_Planned]


class ExpandedPrompts:
    """Plans long prompts and attends to what they see.

    Pieces of one size of one prompt share a plan, so that a step has three plans per prompt.

    Args:
        wrapper_class: FlashInfer's `BatchPrefillWithRaggedKVCacheWrapper`.
        workspace: for all wrappers, which run one after another.
        asked: what each layer asks for.
        merge: joins attention over two pieces.
        block_size: tokens of a block.
    """

    def __init__(
        self,
        wrapper_class: Any,
        workspace: torch.Tensor,
        asked: LayerAttention,
        merge: Merge,
        *,
        block_size: int,
    ) -> None:
        self._wrapper_class, self._workspace = wrapper_class, workspace
        self._asked, self._merge, self._block_size = asked, merge, block_size
        self._wrappers: list[Any] = []

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
                pieces.append(self._placed(wrappers[kind], prompt, piece))
            planned.append(PlannedPrompt(prompt.rows, pieces))
        return planned

    def _planned(self, index: int, num_queries: int, piece: Piece) -> Any:
        if index == len(self._wrappers):
            wrapper = self._wrapper_class(self._workspace, "NHD", backend="fa3")
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

    def _placed(self, wrapper: Any, prompt: LongPrompt, piece: Piece) -> _Planned:
        positions = np.arange(piece.first, piece.first + piece.num_tokens)
        blocks = np.asarray(prompt.block_table, np.int64)[positions // self._block_size]
        places = np.stack([blocks, positions % self._block_size])
        return _Planned(wrapper, *to_device(places, self._workspace.device).unbind())

    def attend(
        self,
        prompt: PlannedPrompt,
        weights: LatentWeights,
        cache: torch.Tensor,
        query: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from the prompt's queries to a layer's rows.

        Args:
            prompt: of the last plan.
            weights: the layer's.
            cache: `[num_blocks, block_size, R + P]`, with the step's own rows.
            query: `[H, T, D]`.

        Returns:
            `[T, H, D_v]`.
        """
        asked = query.transpose(0, 1).contiguous()
        output: torch.Tensor | None = None
        sums: torch.Tensor | None = None
        for piece in prompt.pieces:
            keys, values = _expanded(weights, cache[piece.blocks, piece.offsets])
            part, part_sums = piece.wrapper.run(asked, keys, values, return_lse=True)
            if output is None or sums is None:
                output, sums = part, part_sums
            else:
                self._merge(output, sums, part, part_sums)
        assert output is not None
        return output


def _expanded(weights: LatentWeights, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[S, H, D]` and values `[S, H, D_v]`, as the kernel reads them, of `[S, R + P]` rows.

    As `LatentWeights.expand`, in another order of dimensions.
    """
    num_heads, _, rank = weights.heads.shape
    rotary = rows[:, rank:].unsqueeze(1).expand(-1, num_heads, -1)
    heads = torch.mm(rows[:, :rank], weights.heads.flatten(0, 1).T).view(len(rows), num_heads, -1)
    keys = torch.cat((heads[..., : weights.nope_dim], rotary), dim=-1)
    return keys, heads[..., weights.nope_dim :]
