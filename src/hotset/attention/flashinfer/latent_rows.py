"""What FlashInfer's kernel for latents is told of a step. Imports numpy, no torch.

Every token of a step is a sequence of one row to the kernel, of a prompt and of a decode alike. So
the launch is the same for every step: `MLAPlan` of FlashInfer's `scheduler.cuh` chooses it by the
mean number of heads times rows of a sequence, which is the number of heads. And the kernel for
Hopper (`mla_hopper.cuh`), which bounds what a tile of several tokens sees by its first whole ones,
is exact for any number of heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hotset.attention.batch import Array, SequenceSpan
from hotset.cost.cache_spec import Latent, StoredSpec

# Of partial results: 17 MiB are used on 132 processors.
LATENT_WORKSPACE_BYTES = 64 * 2**20

RANK, ROPE_DIM = 512, 64
_DTYPES = ("bfloat16", "float16")
_ALIGNMENT = 8  # numbers of 16 bits that are loaded at once
_MOST_WORKS = 16384  # of a plan, which does not check it
_PROCESSORS = 256  # at least as many as any GPU has: a plan splits no more works than that
_TILE_ROWS = 64  # of a block; two share a tile where a token has more heads


class Rows(NamedTuple):
    """A step's tokens as sequences of one row, each int32.

    Attributes:
        query_starts: `[T + 1]`, 0 to T.
        block_starts: `[T + 1]`, where the blocks of a token's context begin in `block_ids`; those
            of one sequence share them. The last is the number of `block_ids`.
        lens: `[T]`, tokens that it attends to.
        block_ids: the blocks of all sequences.
    """

    query_starts: Array
    block_starts: Array
    lens: Array
    block_ids: Array


def make_rows(sequences: Sequence[SequenceSpan]) -> Rows:
    """The rows of `sequences`, one after another; at least one sequence."""
    block_ids: list[int] = []
    counts, firsts, befores = np.empty((3, len(sequences)), np.int32)
    for i, seq in enumerate(sequences):
        counts[i], befores[i] = seq.num_tokens, seq.context_len - seq.num_tokens
        firsts[i] = len(block_ids)
        block_ids += seq.block_table
    num_rows = int(counts.sum())
    query_starts = np.arange(num_rows + 1, dtype=np.int32)
    own_starts = np.cumsum(counts, dtype=np.int32) - counts
    lens = np.repeat(befores - own_starts, counts) + query_starts[1:]
    block_starts = np.append(np.repeat(firsts, counts), np.int32(len(block_ids)))
    return Rows(query_starts, block_starts, lens, np.array(block_ids, np.int32))


def scratch_rows(num_rows: int, scratch_block: int) -> Rows:
    """Rows that attend to one token each, all to that of the scratch block."""
    return Rows(
        np.arange(num_rows + 1, dtype=np.int32),
        np.zeros(num_rows + 1, np.int32),
        np.ones(num_rows, np.int32),
        np.array([scratch_block], np.int32),
    )


def most_rows(num_heads: int) -> int:
    """The most rows of a plan.

    A row has a work per tile of its heads, and a context that is split has more of them: no more
    in all than there are processors.
    """
    tile_rows = _TILE_ROWS if num_heads <= _TILE_ROWS else 2 * _TILE_ROWS
    return (_MOST_WORKS - _PROCESSORS) // -(-num_heads // tile_rows)


def parts(num_rows: int, most: int) -> list[slice]:
    """The rows of plans that have at most `most` each."""
    return [slice(start, min(start + most, num_rows)) for start in range(0, num_rows, most)]


def why_not_planned(spec: StoredSpec, dtype: str, capability: tuple[int, int]) -> str | None:
    """What keeps FlashInfer from attending to a layer's latents; None where it can.

    Args:
        spec: what the layer caches.
        dtype: of queries and latents, by its name in PyTorch.
        capability: of the GPU.
    """
    if capability[0] != 9:
        return f"latents on a GPU of compute capability {capability[0]}.{capability[1]}"
    if dtype not in _DTYPES:
        return f"latents of {dtype}"
    if not isinstance(spec, Latent):
        return "a layer without latents"
    if (spec.rank, spec.rope_dim) != (RANK, ROPE_DIM):
        return f"latents of {spec.rank} and {spec.rope_dim} numbers"
    if spec.expanded.key_dim % _ALIGNMENT:
        return f"keys of {spec.expanded.key_dim} numbers"
    return None
