"""Sparse attention by PyTorch's operations: the reference of the kernels, and what a CPU runs."""

from collections.abc import Sequence

import torch

from hotset.attention.batch import SequenceSpan
from hotset.attention.grouped import grouped_query_attention
from hotset.attention.latent import LatentWeights
from hotset.attention.sparse.indexer import Index
from hotset.attention.sparse.select import score_keys, select_positions

# Numbers of an intermediate result, at most: 256 MiB of float32.
_MOST_VALUES = 2**26


class GatheredSelection:
    """What the tokens of one step attend to, from a layer that selects to the next that does.

    Args:
        sequences: of the step, those whose context is longer than what is selected.
        block_size: tokens of a block.
        count: K, that are selected for a token.
        device: of the caches.
    """

    def __init__(
        self,
        sequences: Sequence[SequenceSpan],
        *,
        block_size: int,
        count: int,
        device: torch.device,
    ) -> None:
        self._sequences = sequences
        self._block_size = block_size
        self._count = count
        self._tables = [torch.tensor(s.block_table, device=device) for s in sequences]
        self._selected: list[torch.Tensor] = []  # [Q, K] for each

    def select(self, index: Index, keys: torch.Tensor) -> None:
        """Select for a layer, and for those after it that share its selection.

        Args:
            index: of the step's tokens.
            keys: `[num_blocks, block_size, D]` of the layer, with those of the step.
        """
        self._selected = []
        for sequence, table in zip(self._sequences, self._tables, strict=True):
            n = sequence.context_len
            own = keys[table].flatten(0, 1)[:n]
            lengths = torch.arange(n - sequence.num_tokens + 1, n + 1, device=own.device)
            num_at_once = max(1, _MOST_VALUES // (index.query.shape[2] * n))
            parts = []
            for first in range(0, sequence.num_tokens, num_at_once):
                end = min(first + num_at_once, sequence.num_tokens)
                rows = slice(sequence.start + first, sequence.start + end)
                scores = score_keys(index.query[0, rows], index.weights[0, rows], own)
                parts.append(select_positions(scores, lengths[first:end], self._count))
            self._selected.append(torch.cat(parts))

    def attend(
        self,
        weights: LatentWeights,
        cache: torch.Tensor,
        query: torch.Tensor,
        output: torch.Tensor,
        *,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """Attend to the latents that were selected last.

        Args:
            weights: of the layer.
            cache: `[num_blocks, block_size, R + P]` of the layer, with the step's rows.
            query: `[H, T, D + P]`.
            output: `[T, H, D_v]`. Mutated: the rows of these sequences.
            scaling: factor on the scores.
            sinks: `[H]` or None; see `LayerAttention`.
        """
        rank = weights.keys.shape[-1]
        num_at_once = max(1, _MOST_VALUES // (self._count * cache.shape[-1]))
        for sequence, table, selected in zip(
            self._sequences, self._tables, self._selected, strict=True
        ):
            for first in range(0, sequence.num_tokens, num_at_once):
                at = selected[first : first + num_at_once].long()
                rows = slice(sequence.start + first, sequence.start + first + len(at))
                places = at.clamp(min=0)
                keys = cache[table[places // self._block_size], places % self._block_size]
                mask = torch.zeros_like(at, dtype=query.dtype).masked_fill_(at < 0, -torch.inf)
                out = grouped_query_attention(
                    weights.absorb(query[:, rows]).transpose(0, 1).unsqueeze(2),  # [Q, H, 1, R + P]
                    keys.unsqueeze(1),  # [Q, 1, K, R + P]
                    keys[..., :rank].unsqueeze(1),
                    mask[:, None, None],
                    scaling=scaling,
                    softcap=None,
                    sinks=sinks,
                )
                output[rows] = weights.mix(out.squeeze(2).transpose(0, 1)).transpose(0, 1)
