"""Where each token of a step finds what precedes it, in plain numbers. Imports numpy, no torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hotset.attention.batch import Array, SequenceSpan


class TokenTables(NamedTuple):
    """What `kernels.index_scores.PagedTokens` has, on the host; each int32."""

    block_ids: Array
    starts: Array
    lengths: Array


def token_tables(sequences: Sequence[SequenceSpan]) -> TokenTables:
    """The tables of the tokens of `sequences`, which follow each other."""
    block_ids: list[int] = []
    first_blocks, counts, contexts = np.zeros((3, len(sequences)), np.int32)
    for i, sequence in enumerate(sequences):
        first_blocks[i] = len(block_ids)
        counts[i], contexts[i] = sequence.num_tokens, sequence.context_len
        block_ids += sequence.block_table
    ends = np.cumsum(counts, dtype=np.int32)
    # Of a sequence, the last token sees the whole context, each before it one token less.
    lengths = np.arange(1, counts.sum() + 1, dtype=np.int32) + np.repeat(contexts - ends, counts)
    return TokenTables(np.array(block_ids, np.int32), np.repeat(first_blocks, counts), lengths)
