"""What FlashInfer is told of a step, in plain numbers. Imports numpy, no torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hotset.attention.batch import Array, SequenceSpan


class Tables(NamedTuple):
    """Sequences as FlashInfer's kernels find them, each int32.

    Attributes:
        query_starts: `[R + 1]`, where each sequence's queries begin, and where the last ones end.
        block_starts: `[R + 1]`, the same for their blocks in `block_ids`.
        block_ids: the blocks of all sequences.
        last_lens: `[R]`, tokens in the last block.
    """

    query_starts: Array
    block_starts: Array
    block_ids: Array
    last_lens: Array


def make_tables(
    sequences: Sequence[SequenceSpan], block_size: int, *, size: int = 0, first_row: int = 0
) -> Tables:
    """The tables of `sequences`, one after another, then of empty ones up to `size` in all.

    `first_row` is where their queries begin.
    """
    block_ids: list[int] = []
    size = max(size, len(sequences))
    queries, num_blocks, last_lens = np.zeros((3, size), np.int32)
    for i, seq in enumerate(sequences):
        num_blocks[i] = blocks_of(seq.context_len, block_size)
        queries[i] = seq.num_tokens
        last_lens[i] = (seq.context_len - 1) % block_size + 1
        block_ids += seq.block_table
    return Tables(
        _starts(queries, first_row), _starts(num_blocks), np.array(block_ids, np.int32), last_lens
    )


def _starts(counts: Array, first: int = 0) -> Array:
    starts = np.full(len(counts) + 1, first, np.int32)
    starts[1:] += np.cumsum(counts, dtype=np.int32)
    return starts


def blocks_of(num_tokens: int, block_size: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // block_size)


def most_query_tokens(sequences: Sequence[SequenceSpan]) -> int:
    """Tokens of the longest of `sequences` in this step; 0 for none."""
    return max((seq.num_tokens for seq in sequences), default=0)


def fits(sequences: Sequence[SequenceSpan], block_size: int, num_blocks: int) -> bool:
    """Whether all that `sequences` attend to has room in `num_blocks` blocks."""
    return sum(blocks_of(seq.context_len, block_size) for seq in sequences) <= num_blocks


def padded(sequences: Sequence[SequenceSpan], size: int, scratch_block: int) -> list[SequenceSpan]:
    """Decodes for a recorded step of `size`: the rows beyond `sequences` read the scratch block."""
    return [*sequences, *[SequenceSpan(0, 1, 1, [scratch_block])] * (size - len(sequences))]


def scratch_step(
    num_tokens: int, num_seqs: int, block_size: int, scratch_block: int
) -> tuple[list[SequenceSpan], list[SequenceSpan]]:
    """Decodes and prompts of the step that one of `num_tokens` tokens is recorded with.

    It has as many sequences as any step of that size, and one prompt of all its tokens; all of them
    read and write the scratch block.
    """
    num_blocks = blocks_of(num_tokens, block_size)
    prompt = SequenceSpan(0, num_tokens, num_tokens, [scratch_block] * num_blocks)
    return padded([], min(num_seqs, num_tokens), scratch_block), [prompt]
