"""Sparse attention over latents by FlashInfer: it attends to the rows that an indexer selected."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hotset.attention.backend import Run
from hotset.attention.batch import Batch
from hotset.attention.flashinfer.build import importing
from hotset.attention.flashinfer.kernels import KernelBuild
from hotset.attention.flashinfer.latent import LatentBackend
from hotset.attention.flashinfer.latent_rows import Rows, make_rows, parts
from hotset.attention.flashinfer.latent_steps import (
    LatentAttention,
    PlannedLatents,
    RecordedLatents,
)
from hotset.attention.flashinfer.long_prompts import LongPrompt
from hotset.attention.hot_rows import HotRows
from hotset.attention.inputs import Inputs, fill, to_device
from hotset.attention.sparse.drawn import DrawnSelection, seeds_of
from hotset.attention.sparse.indexer import Index
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.attention.sparse.rounded import turned_query
from hotset.attention.spec import LayerAttention
from hotset.cost.workspace import SCORES_BYTES
from hotset.memory.arena import DeviceArena, row_steps
from hotset.parallel.collectives import share_attended

if TYPE_CHECKING:
    from hotset.kernels.hot_reference import Misses
    from hotset.kernels.index_scores import PagedTokens

_LOWER_POSITION = 1  # FlashInfer's `TopKTieBreak.SMALL`


@dataclass(frozen=True, slots=True)
class SparseStep:
    """Where the T tokens of a step find what they see, and what they attend to.

    Attributes:
        tokens: of the step; rows beyond it see nothing.
        rows: `[T, K]` int32, the rows of the pool that were selected last, which the plan reads:
            as many as a token sees, and at most K.
        sums: `[T, H]` float32, of layers with sinks what their softmax sums to.
        misses: of the layer that selected last, the rows that have to come from host memory.
    """

    tokens: "PagedTokens"
    rows: torch.Tensor
    sums: torch.Tensor
    misses: list["Misses"] = field(default_factory=list)

    def part(self, num_tokens: int) -> "SparseStep":
        """The first tokens of a step."""
        tokens = self.tokens.rows(0, num_tokens)
        return SparseStep(tokens, self.rows[:num_tokens], self.sums[:num_tokens], self.misses)


class SparseBackend(LatentBackend):
    """Attention of one step after another to selected latents, launched or recorded.

    To FlashInfer a token's selected rows are pages of one row, so that one plan serves all layers,
    of decodes and prompts alike. A token that sees no more than is selected attends to all of it,
    and nothing is scored for it.

    Args:
        arena: has latents and index keys.
        layers: what each asks for, the same but for whose selection it takes.
        max_context: most tokens of one sequence.
        hot: the rows of hot requests; None where none may be hot.
        drawn: replaces scores, once they were computed; None keeps them.
        kernels: see `LatentBackend`.
        waits: likewise.

    Raises:
        ModelError: see `LatentBackend`.
    """

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        *,
        max_context: int,
        hot: HotRows | None = None,
        drawn: DrawnSelection | None = None,
        kernels: KernelBuild | None = None,
        waits: bool = True,
    ) -> None:
        super().__init__(arena, layers, kernels=kernels, waits=False)
        with importing():
            from flashinfer import top_k_ragged_transform

            from hotset.kernels import index_scores
            from hotset.kernels.store_index import store_index
        self.store_index = store_index
        self._select_with(top_k_ragged_transform, index_scores, max_context, hot, drawn)
        if waits:
            self.load()

    def _select_with(
        self,
        top_k: Any,
        kernels: Any,
        max_context: int,
        hot: HotRows | None,
        drawn: DrawnSelection | None,
    ) -> None:
        self._top_k, self._scoring, self._hot, self._drawn = top_k, kernels, hot, drawn
        self.recorder: SelectionRecorder | None = None
        self._width = -(-max_context // 4) * 4  # scores are read four at once
        self._most_scored = max(1, SCORES_BYTES // (4 * self._width))

    def _set_up(
        self, arena: DeviceArena, layers: Sequence[LayerAttention], workspace_bytes: int
    ) -> None:
        super()._set_up(arena, layers, workspace_bytes)
        indexer = layers[0].indexer
        assert indexer is not None
        self.layers, self.count, self._indexer = layers, indexer.top_k, indexer
        if any(scales is not None for scales in arena.index_scales):
            # What `store_index` does to a query: numbers that any dtype has, for one product.
            unit = torch.eye(indexer.key_dim, device=self.device)
            self._turn = turned_query(unit).to(layers[0].dtype)
        self._page_size = 1
        self.caches = [_pages(cache, self.rank) for cache in arena.layers]

    def _try(self, query: torch.Tensor, rows: Rows) -> None:
        """Select and attend for one token, so that its kernels are there."""
        indexer = self._indexer
        zeros = query.new_zeros(1, 1, indexer.num_heads, indexer.key_dim)
        no_seat = torch.full((1,), -1, device=self.device)
        index = Index(zeros, zeros[:, :, 0], zeros[..., 0].float(), no_seat)
        block = torch.full((1,), self.arena.num_blocks - 1, device=self.device)
        index = self.store(0, index, block, torch.zeros_like(block))
        step, slices = self._launched_step(rows)
        self.run(step, slices, 0, query, torch.empty_like(query[..., : self.rank]), index)

    def use_all_kernels(self, *, waits: bool) -> bool:
        """See `RecordableBackend`: `load` has them all."""
        return True

    def long_prompts(self, batch: Batch) -> list[LongPrompt]:
        """None: no token attends to more rows than are selected."""
        return []

    def plan(self, batch: Batch) -> PlannedLatents:
        """Never: prompts are recorded too, and to attend takes the layer's `Index`."""
        raise NotImplementedError

    def begin_step(self, batch: Batch, inputs: Inputs) -> "SparseAttention":
        """See `AttentionBackend`."""
        step, slices = self._launched_step(make_rows(batch.sequences))

        def run(layer: int, query: torch.Tensor, index: Index) -> torch.Tensor:
            output = torch.empty_like(query[..., : self.rank])
            return self.run(step, slices, layer, query, output, index)

        return SparseAttention(self, inputs, run)

    def step_with(self, inputs: Inputs, run: Run) -> "SparseAttention":
        """See `RecordableBackend`."""
        return SparseAttention(self, inputs, run)

    def _recorded(
        self,
        num_rows: int,
        block_ids: torch.Tensor,
        scratch_block: int,
        inputs: Inputs | None = None,
    ) -> "RecordedSparse":
        return RecordedSparse(self, num_rows, block_ids, scratch_block, inputs)

    def static_step(self, num_tokens: int, block_ids: torch.Tensor) -> SparseStep:
        """A step at a fixed place, of tokens that see nothing."""
        starts, lengths = block_ids.new_zeros(2, num_tokens)
        sums = torch.zeros(num_tokens, self._asked.num_heads, device=self.device)
        tokens = self._scoring.PagedTokens(block_ids, starts, lengths)
        return SparseStep(tokens, block_ids.new_zeros(num_tokens, self.count), sums)

    def _launched_step(self, rows: Rows) -> tuple[SparseStep, list[slice]]:
        """A step that is launched, planned in as many parts as it takes."""
        num_tokens = len(rows.lens)
        step = self.static_step(num_tokens, to_device(rows.block_ids, self.device))
        fill(step.tokens.starts, rows.block_starts[:-1])
        fill(step.tokens.lengths, rows.lens)
        slices = parts(num_tokens, self._most_rows)
        self.plan_selected(rows, slices, step)
        return step, slices

    def plan_selected(self, rows: Rows, slices: Sequence[slice], step: SparseStep) -> None:
        """Plan that each token of `rows` attends to its part of `step.rows`, or to all it sees."""
        lens = np.minimum(rows.lens, np.int32(self.count))
        starts = rows.query_starts * np.int32(self.count)
        selected = Rows(rows.query_starts, starts, lens, rows.block_ids)
        self.plan_rows(selected, slices, step.rows.view(-1))

    def run(
        self,
        step: SparseStep,
        slices: Sequence[slice],
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        index: Index,
    ) -> torch.Tensor:
        """Select where the layer does, then attend to what was selected last.

        Args:
            step: its T tokens.
            slices: the tokens of each plan.
            layer: whose latents and index keys are stored.
            query: absorbed, `[T, H, R + P]`.
            output: `[T, H, R]`. Mutated, but for tokens that were not planned.
            index: of the layer, or of the one that it takes its selection from.

        Returns:
            `[T, H, R]`, weighted sums of latents.
        """
        hot, guessed = self._hot, []
        if self.layers[layer].index_dim:
            self._select(step, layer, index)
            if hot is not None:
                hot.begin(layer, step.misses)
                guessed = self._guess(step, layer, index)
        if hot is not None:
            hot.fetch(layer, step.misses)
            if guessed:
                hot.guess(layer, guessed)
        sinks = self.layers[layer].sinks
        for number, part in enumerate(slices):
            options = {}
            if sinks is not None:
                options = {
                    "lse": step.sums[part],
                    "return_lse": True,
                    "return_lse_base_on_e": True,
                }
            self.attend_part(number, layer, query[part], output[part], **options)
        if sinks is None:
            return output
        # They take part in the softmax, and add nothing.
        shares = torch.sigmoid(step.sums - sinks).unsqueeze(-1)
        return (output * shares).to(output.dtype)

    def store(self, layer: int, index: Index, blocks: torch.Tensor, offsets: torch.Tensor) -> Index:
        """Write a layer's index keys, `[1, T, D]`, to their places.

        Returns:
            What scores keys as they are stored.
        """
        keys, scales = self.arena.index_keys[layer], self.arena.index_scales[layer]
        if scales is None:
            keys[blocks, offsets] = index.key[0]
            return index
        query = index.query[0].contiguous()
        turned = torch.empty_like(query)
        self.store_index(query, index.key[0], turned, keys, scales, blocks, offsets)
        return index._replace(query=turned.unsqueeze(0))

    def _select(self, step: SparseStep, layer: int, index: Index) -> None:
        """Score the keys that each token sees, and put the rows of the highest into `step.rows`."""
        query, weights = index.query[0].contiguous(), index.weights[0].contiguous()
        step.misses.clear()
        for part, scores in self._parts(len(query)):
            tokens = step.tokens.rows(part.start, part.stop)
            positions = self._highest(scores, layer, query[part], weights[part], tokens)
            if self.recorder is not None:
                self.recorder.note(layer, positions, part.start)
            self._find_rows(layer, positions, tokens, step.rows[part])
            if self._hot is not None and part.start < self._hot.num_seats:
                # Hot requests decode, and decodes come before all other tokens.
                assert index.seats is not None
                end = min(part.stop, self._hot.num_seats)
                first = slice(part.start, end)
                found = positions[: end - part.start], step.rows[first], index.seats[first]
                step.misses.append(self._hot.resolve(layer, *found))

    def _guess(
        self, step: SparseStep, layer: int, index: Index
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What hot requests are guessed to select next: positions, rows and seats of some each."""
        guess, seats, found = index.guess, index.seats, []
        if guess is None:
            return []
        assert seats is not None and self._hot is not None
        ahead = self._hot.next_layer(layer)
        query, weights = guess.query[0].contiguous(), guess.weights[0].contiguous()
        if self.arena.index_scales[ahead] is not None:
            query = query @ self._turn
        for part, scores in self._parts(len(query)):
            seated, tokens = seats[part], step.tokens.rows(part.start, part.stop)
            # A token's own key is not there yet, and its row is resident. No other request guesses.
            lengths = torch.where(seated >= 0, tokens.lengths - 1, 0)
            tokens = tokens._replace(lengths=lengths)
            asked = query[part], weights[part], tokens
            positions = self._highest(scores, ahead, *asked, is_guess=True)
            rows = torch.empty_like(positions)
            self._find_rows(ahead, positions, tokens, rows)
            found.append((positions, rows, seated))
        return found

    def _parts(self, num_tokens: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Tokens that are scored at once, and `[T, N]` float32 for their scores."""
        num_scored = min(num_tokens, self._most_scored)
        scores = torch.empty(num_scored, self._width, device=self.device)
        for part in parts(num_tokens, num_scored):
            yield part, scores[: part.stop - part.start]

    def _highest(
        self,
        scores: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        weights: torch.Tensor,
        tokens: "PagedTokens",
        *,
        is_guess: bool = False,
    ) -> torch.Tensor:
        """The positions of a layer's highest scores, `[T, K]` int32; `scores` are overwritten.

        Ranks that compute a layer together take rank 0's.
        """
        keys = self.arena.index_keys[layer]
        self._scoring.score_paged_keys(
            query,
            weights,
            keys,
            tokens,
            scores,
            count=self.count,
            key_scales=self.arena.index_scales[layer],
        )
        if self._drawn is not None:
            seeds = seeds_of(keys, tokens.block_ids.index_select(0, tokens.starts))
            self._drawn.replace(scores, tokens.lengths, seeds, layer, is_guess=is_guess)
        positions: torch.Tensor = self._top_k(
            scores,
            torch.zeros_like(tokens.lengths),
            tokens.lengths,
            self.count,
            deterministic=True,
            tie_break=_LOWER_POSITION,
        )
        share_attended(positions)
        return positions

    def _find_rows(
        self, layer: int, positions: torch.Tensor, tokens: "PagedTokens", rows: torch.Tensor
    ) -> None:
        rows_per_block, rows_per_token = row_steps(self.arena.layers[layer])
        self._scoring.find_rows(
            positions,
            tokens,
            rows,
            block_size=self.arena.block_size,
            rows_per_block=rows_per_block,
            rows_per_token=rows_per_token,
        )


def _pages(cache: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """A layer's latents and rotary keys, `[num_blocks, block_size, R + P]`, as pages of one row.

    Each is `[N, 1, R or P]`, numbered as `row_steps` says: rows of other layers are in between.
    """
    num_blocks, block_size, width = cache.shape
    per_block, per_token = row_steps(cache)
    num_rows = (num_blocks - 1) * per_block + (block_size - 1) * per_token + 1
    rows = cache.as_strided((num_rows, 1, width), (width, width, 1))
    pages: tuple[torch.Tensor, ...] = rows.split([rank, width - rank], dim=-1)
    return pages


class SparseAttention(LatentAttention):
    """The attention of one step; implements `StepAttention`."""

    def __init__(self, backend: SparseBackend, inputs: Inputs, run: Run) -> None:
        super().__init__(backend, inputs, run)
        self._sparse = backend

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """See `StepAttention`."""
        assert index is not None
        if self._sparse.layers[layer].index_dim:
            index = self._sparse.store(layer, index, self._inputs.blocks, self._inputs.offsets)
        seated = index._replace(seats=self._inputs.seats)
        return super().attend(layer, query, key, value, seated)


class RecordedSparse(RecordedLatents):
    """Attention of recorded steps of at most `num_rows` tokens, of any kind.

    See `RecordedLatents`. Rows beyond a step see nothing.
    """

    def __init__(
        self,
        backend: SparseBackend,
        num_rows: int,
        block_ids: torch.Tensor,
        scratch_block: int,
        inputs: Inputs | None = None,
    ) -> None:
        self._sparse = backend
        self._step = backend.static_step(num_rows, block_ids)
        super().__init__(backend, num_rows, block_ids, scratch_block, inputs)

    def _plan(self, rows: Rows) -> None:
        tokens, num_tokens = self._step.tokens, len(rows.lens)
        beyond = (0, len(tokens.lengths) - num_tokens)
        self._sparse.wait_for_plan()
        fill(tokens.block_ids[: len(rows.block_ids)], rows.block_ids)
        fill(tokens.starts[:num_tokens], rows.block_starts[:-1])
        fill(tokens.lengths, np.pad(rows.lens, beyond))
        self._sparse.plan_selected(rows, [slice(0, num_tokens)], self._step)

    def run(self, layer: int, query: torch.Tensor, *index: Index) -> torch.Tensor:
        """See `RecordedMixed`; `query` is absorbed, `[T, H, R + P]`."""
        num_tokens = len(query)
        output, slices = self._output[:num_tokens], [slice(0, num_tokens)]
        return self._sparse.run(self._step.part(num_tokens), slices, layer, query, output, *index)
