"""Sparse attention by PyTorch's operations: the reference of the kernels, and what a CPU runs."""

from collections.abc import Sequence

import torch

from hotset.attention.batch import SequenceSpan
from hotset.attention.grouped import grouped_query_attention
from hotset.attention.hot_rows import HotRows
from hotset.attention.latent import LatentWeights
from hotset.attention.sparse.drawn import DrawnSelection, seeds_of
from hotset.attention.sparse.indexer import Guess, Index
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.attention.sparse.rounded import turned_query, widen_keys
from hotset.attention.sparse.select import score_keys, select_positions
from hotset.cost.cache_spec import KEYS_ALONE
from hotset.kernels.hot_reference import Misses
from hotset.memory.arena import DeviceArena, row_steps
from hotset.parallel.collectives import share_attended

# Numbers of an intermediate result, at most: 256 MiB of float32.
_MOST_VALUES = 2**26


class GatheredSelection:
    """What the tokens of one step attend to, from a layer that selects to the next that does.

    Args:
        sequences: of the step, those whose context is longer than what is selected.
        arena: has latents and index keys.
        count: K, that are selected for a token.
        seats: for each sequence, its row in the tables of hot requests; -1 where it is not hot.
        hot: the rows of hot requests; None where none may be hot.
        drawn: replaces scores; None keeps them.
        recorder: notes what decodes select; None notes nothing.
    """

    def __init__(
        self,
        sequences: Sequence[SequenceSpan],
        *,
        arena: DeviceArena,
        count: int,
        seats: Sequence[int],
        hot: HotRows | None,
        drawn: DrawnSelection | None,
        recorder: SelectionRecorder | None,
    ) -> None:
        self._sequences, self._arena, self._count = sequences, arena, count
        device = arena.storage.device
        self._hot, self._drawn, self._recorder = hot, drawn, recorder
        self._seated = [i for i, seat in enumerate(seats) if seat >= 0]
        self._seats = torch.tensor([seats[i] for i in self._seated], device=device)
        self._misses: Misses | None = None
        self._tables = [torch.tensor(s.block_table, device=device) for s in sequences]
        self._rows: list[torch.Tensor] = []  # [Q, K] for each

    def select(self, layer: int, index: Index) -> None:
        """Select for a layer, and for those after it that share its selection.

        Args:
            layer: that selects, and whose index keys of the step are stored.
            index: of the step's tokens.
        """
        query, weights, positions = index.query[0], index.weights[0], []
        for sequence, table in zip(self._sequences, self._tables, strict=True):
            n = sequence.context_len
            lengths = torch.arange(n - sequence.num_tokens + 1, n + 1, device=query.device)
            rows = slice(sequence.start, sequence.start + sequence.num_tokens)
            asked = query[rows], weights[rows], lengths
            positions.append(self._highest(layer, table, *asked))
            if self._recorder is not None:
                self._recorder.note(layer, positions[-1], sequence.start)
        self._rows = [
            self._rows_of(layer, *each) for each in zip(positions, self._tables, strict=True)
        ]
        if self._seated:
            assert self._hot is not None
            selected, found = (
                torch.cat([each[i] for i in self._seated]) for each in (positions, self._rows)
            )
            self._misses = self._hot.resolve(layer, selected, found, self._seats)
            for i, own in zip(self._seated, found.unsqueeze(1), strict=True):
                self._rows[i] = own
            self._hot.begin(layer, [self._misses])

    def guess(self, layer: int, guess: Guess) -> None:
        """Fetch what hot requests are guessed to select next, after `attend` of a layer.

        Args:
            layer: that selected last.
            guess: of the step's first tokens, with those of all hot requests.
        """
        if not self._seated:
            return
        assert self._hot is not None
        ahead, positions, rows = self._hot.next_layer(layer), [], []
        for i in self._seated:
            sequence, table = self._sequences[i], self._tables[i]
            token = slice(sequence.start, sequence.start + 1)
            # The token's own key is not there yet, and its row is resident.
            before = torch.tensor([sequence.context_len - 1], device=guess.query.device)
            asked = guess.query[0, token], guess.weights[0, token], before
            positions.append(self._highest(ahead, table, *asked, is_guess=True))
            rows.append(self._rows_of(ahead, positions[-1], table))
        self._hot.guess(layer, [(torch.cat(positions), torch.cat(rows), self._seats)])

    def _highest(
        self,
        layer: int,
        table: torch.Tensor,
        query: torch.Tensor,
        weights: torch.Tensor,
        lengths: torch.Tensor,
        *,
        is_guess: bool = False,
    ) -> torch.Tensor:
        """The positions of a layer's highest scores in a sequence, `[Q, K]` int32.

        Ranks that compute a layer together take rank 0's.

        Args:
            layer: that has the index keys.
            table: blocks of the sequence.
            query: `[Q, H_i, D]`.
            weights: `[Q, H_i]`.
            lengths: `[Q]`, leading keys that each scores, ascending.
            is_guess: see `DrawnSelection.replace`.
        """
        # [num_blocks or more, block_size, D], and [num_blocks or more, block_size]
        keys, scales = self._arena.index_keys[layer], self._arena.index_scales[layer]
        query = query if scales is None else turned_query(query)
        blocks, num_keys = table & ~KEYS_ALONE, int(lengths[-1])
        own = keys[blocks] if scales is None else widen_keys(keys, scales, blocks)
        own = own.flatten(0, 1)[:num_keys]
        num_at_once = max(1, _MOST_VALUES // (query.shape[1] * num_keys))
        found = []
        for first in range(0, len(query), num_at_once):
            rows = slice(first, first + num_at_once)
            scores = score_keys(query[rows], weights[rows], own)
            if self._drawn is not None:
                seeds = seeds_of(keys, table[:1].expand(len(scores)))
                self._drawn.replace(scores, lengths[rows], seeds, layer, is_guess=is_guess)
            found.append(select_positions(scores, lengths[rows], self._count))
        positions = torch.cat(found)
        share_attended(positions)
        return positions

    def _rows_of(self, layer: int, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Numbers of a layer's rows at `[Q, K]` positions, int32; -1 where there is none."""
        per_block, per_token = row_steps(self._arena.layers[layer])
        size, places = self._arena.block_size, positions.clamp(min=0).long()
        blocks = table[places // size]
        rows = blocks * per_block + places % size * per_token
        return rows.masked_fill_((positions < 0) | (blocks >= KEYS_ALONE), -1).int()

    def attend(
        self,
        layer: int,
        weights: LatentWeights,
        query: torch.Tensor,
        output: torch.Tensor,
        *,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """Attend to the latents that were selected last.

        Args:
            layer: that attends, and whose latents of the step are stored.
            weights: of the layer.
            query: `[H, T, D + P]`.
            output: `[T, H, D_v]`. Mutated: the rows of these sequences.
            scaling: factor on the scores.
            sinks: `[H]` or None; see `LayerAttention`.
        """
        if self._misses is not None:
            assert self._hot is not None
            self._hot.fetch(layer, [self._misses])
        cache, rank = self._arena.layers[layer], weights.keys.shape[-1]
        per_block, per_token = row_steps(cache)
        num_at_once = max(1, _MOST_VALUES // (self._count * cache.shape[-1]))
        for sequence, found in zip(self._sequences, self._rows, strict=True):
            for first in range(0, sequence.num_tokens, num_at_once):
                at = found[first : first + num_at_once].long()
                rows = slice(sequence.start + first, sequence.start + first + len(at))
                places = at.clamp(min=0)
                keys = cache[places // per_block, places % per_block // per_token]
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
