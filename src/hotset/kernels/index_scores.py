"""Scores of a sparse-attention indexer over paged keys, and the rows of what was selected."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hotset.cost.cache_spec import KEYS_ALONE

_TILE = 128  # keys of a product
# Programs of a launch, about: a few waves on any GPU, whatever the number of tokens.
_PROGRAMS = 2048
_ROWS_TILE = 1024
_SIZES = ["rows_per_block", "rows_per_token", "count"]


class PagedTokens(NamedTuple):
    """Where each token of a step finds what precedes it; all on one device, contiguous.

    Attributes:
        block_ids: int32, the blocks of all sequences one after another; of one with `KEYS_ALONE`
            the index keys alone are of the sequence.
        starts: `[T]` int32, where the blocks of the token's sequence begin in `block_ids`.
        lengths: `[T]` int32, tokens that it sees, with itself.
    """

    block_ids: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    def rows(self, first: int, end: int) -> "PagedTokens":
        """The same of tokens `first` to before `end`."""
        return PagedTokens(self.block_ids, self.starts[first:end], self.lengths[first:end])


@triton.jit(do_not_specialize=["count", "width"])  # type: ignore[untyped-decorator]
def _score(  # type: ignore[no-untyped-def]
    query,
    weights,
    keys,
    key_scales,
    block_ids,
    starts,
    lengths,
    scores,
    keys_stride_block,
    keys_stride_slot,
    scales_stride_block,
    count,
    width,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    KEYS_ALONE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + token)
    if length > count:  # else all are selected, whatever their scores
        head, d, n = tl.arange(0, HEADS), tl.arange(0, DIM), tl.arange(0, TILE)
        is_head = head < NUM_HEADS
        at = (token * NUM_HEADS + head[:, None]) * DIM + d[None, :]
        q = tl.load(query + at, mask=is_head[:, None], other=0.0)
        w = tl.load(weights + token * NUM_HEADS + head, mask=is_head, other=0.0)
        block_ids += tl.load(starts + token)
        for tile in range(tl.program_id(1), tl.cdiv(length, TILE), tl.num_programs(1)):
            place = tile * TILE + n
            is_seen = place < length
            block = tl.load(block_ids + place // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
            block &= ~KEYS_ALONE
            slot = block * keys_stride_block + (place % BLOCK_SIZE) * keys_stride_slot
            k = tl.load(keys + slot[:, None] + d[None, :], mask=is_seen[:, None])
            product = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
            score = tl.sum(tl.maximum(product, 0.0) * w[:, None], axis=0)
            if HAS_SCALES:
                of_block = key_scales + block * scales_stride_block
                score *= tl.load(of_block + place % BLOCK_SIZE, mask=is_seen)
            score = tl.where(score == 0.0, 0.0, score)  # no negative zero: selection compares bits
            tl.store(scores + token * width + place, score, mask=is_seen)


def score_paged_keys(
    query: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    tokens: PagedTokens,
    scores: torch.Tensor,
    *,
    count: int,
    key_scales: torch.Tensor | None = None,
) -> None:
    """How much each token is to attend to each that it sees: `sum_h weights_h * relu(query_h . k)`.

    Args:
        query: `[T, H_i, D]`, contiguous; D a power of 2, 16 or more.
        weights: `[T, H_i]` float32, contiguous.
        keys: `[num_blocks, block_size, D]`, the last dimension contiguous; dtype of `query`, or
            float8_e4m3fn, each of which is a number of that dtype too.
        tokens: of the T tokens.
        scores: `[T, N]` float32, contiguous, N at least each length. Mutated: of tokens that see
            more than `count`, the first `length` of a row. No score is a negative zero.
        count: that are selected of each; fewer need no scores.
        key_scales: `[num_blocks, block_size]` float32, the last dimension contiguous, above 0: what
            a key has to be multiplied with. None is 1.

    Cost: 2 * H_i * D operations per token and key that it sees.
    Reference: `hotset.attention.sparse.select.score_keys`.
    """
    num_tokens, num_heads, dim = query.shape
    programs_per_token = min(
        triton.cdiv(_PROGRAMS, num_tokens), triton.cdiv(scores.shape[1], _TILE)
    )
    _score[(num_tokens, programs_per_token)](
        query,
        weights,
        keys,
        key_scales,
        tokens.block_ids,
        tokens.starts,
        tokens.lengths,
        scores,
        keys.stride(0),
        keys.stride(1),
        0 if key_scales is None else key_scales.stride(0),
        count,
        scores.shape[1],
        BLOCK_SIZE=keys.shape[1],
        NUM_HEADS=num_heads,
        HEADS=max(16, triton.next_power_of_2(num_heads)),
        DIM=dim,
        TILE=_TILE,
        HAS_SCALES=key_scales is not None,
        KEYS_ALONE=KEYS_ALONE,
    )


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _find_rows(  # type: ignore[no-untyped-def]
    positions,
    block_ids,
    starts,
    rows,
    rows_per_block,
    rows_per_token,
    count,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KEYS_ALONE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_one = i < count
    position = tl.load(positions + token * count + i, mask=is_one, other=-1)
    is_selected = position >= 0
    at = block_ids + tl.load(starts + token) + position // BLOCK_SIZE
    block = tl.load(at, mask=is_selected, other=KEYS_ALONE)
    row = block * rows_per_block + position % BLOCK_SIZE * rows_per_token
    row = tl.where(block < KEYS_ALONE, row, -1)
    tl.store(rows + token * count + i, row, mask=is_one)


def find_rows(
    positions: torch.Tensor,
    tokens: PagedTokens,
    rows: torch.Tensor,
    *,
    block_size: int,
    rows_per_block: int,
    rows_per_token: int,
) -> None:
    """Turn positions in a sequence into rows of the pool, which a layer's first row counts from.

    Args:
        positions: `[T, K]` int32, contiguous; -1 where there is none.
        tokens: of the T tokens.
        rows: `[T, K]` int32, contiguous. Mutated: `block * rows_per_block + offset *
            rows_per_token` of each position; -1 where there is none, or where its block
            has index keys alone.
        block_size: tokens of a block.
        rows_per_block: rows of the pool from one block to the next; see `arena.row_steps`.
        rows_per_token: likewise from one token to the next.
    """
    num_tokens, count = positions.shape
    _find_rows[(num_tokens, triton.cdiv(count, _ROWS_TILE))](
        positions,
        tokens.block_ids,
        tokens.starts,
        rows,
        rows_per_block,
        rows_per_token,
        count,
        BLOCK_SIZE=block_size,
        TILE=min(_ROWS_TILE, triton.next_power_of_2(count)),
        KEYS_ALONE=KEYS_ALONE,
    )
