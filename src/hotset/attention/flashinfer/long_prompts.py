"""Which prompts attend to keys and values of all heads. Imports numpy, no torch.

Of H heads an absorbed query takes `2H(2R + P)` operations per token it attends to, and one that
attends to keys and values `2H(D + D_v)`. To make these of a latent takes `2RH(N + D_v)` operations,
where N is D without its rotary part. To absorb a query and to turn its output into values takes as
many, so that what is made of the prompt's own tokens costs nothing more: only of earlier ones. A
prompt of many tokens pays for them: from 171 on with DeepSeek-V3's sizes, where the second kind
takes 3.4 times less per pair.
"""

from collections.abc import Sequence
from typing import NamedTuple

from hotset.attention.batch import SequenceSpan
from hotset.cost.cache_spec import KeysValues, Latent
from hotset.cost.workspace import EXPANDED_BYTES

# Widths of keys and values that FlashInfer's kernel for Hopper has.
_WIDTHS = ((128, 128), (192, 128), (256, 256))

# A step with such prompts is launched, not replayed, which costs 0.16 ms per layer: by the 500
# TFLOP/s that attention reaches.
_LAUNCH_OPERATIONS = 80e9
# A prompt adds about five launches of 4 us each per layer.
_PROMPT_OPERATIONS = 10e9

# Of a step, each planned apart: those that gain the most.
MOST_PROMPTS = 4

_ITEMSIZE = 2  # bytes of a number: the kernel has types of 16 bits alone
_TILE_TOKENS = 128  # of a context, that the kernel loads at once


class Piece(NamedTuple):
    """Tokens of a context, from the `first` on; a causal piece ends with the prompt's own."""

    first: int
    num_tokens: int
    is_causal: bool


class LongPrompt(NamedTuple):
    """A prompt's part of a step.

    Attributes:
        rows: of the step, at most `piece_tokens`.
        past: tokens before these.
        block_table: of the whole context.
        piece_tokens: most tokens of a piece.
    """

    rows: slice
    past: int
    block_table: Sequence[int]
    piece_tokens: int

    @property
    def num_tokens(self) -> int:
        """How many."""
        return int(self.rows.stop - self.rows.start)

    @property
    def pieces(self) -> list[Piece]:
        """What it attends to: pieces of the same size, at most one smaller, and the causal one."""
        end, first = self.past + self.num_tokens, 0
        found = []
        while end - first > self.piece_tokens:
            found.append(Piece(first, min(self.piece_tokens, self.past - first), False))
            first += found[-1].num_tokens
        return [*found, Piece(first, end - first, True)]


def most_piece_tokens(heads: KeysValues) -> int:
    """Tokens whose keys and values are there at once: 8,192 with DeepSeek-V3's sizes."""
    token_bytes = _ITEMSIZE * heads.num_kv_heads * (heads.key_dim + heads.value_dim)
    return max(1, EXPANDED_BYTES // token_bytes // _TILE_TOKENS) * _TILE_TOKENS


def can_expand(heads: KeysValues) -> bool:
    """Whether there is a kernel for such keys and values."""
    return (heads.key_dim, heads.value_dim) in _WIDTHS


def saved_operations(spec: Latent, num_tokens: int, past: int) -> float:
    """Operations of a layer that a prompt of `num_tokens` after `past` saves; below 0 if none."""
    pairs = num_tokens * past + num_tokens * (num_tokens + 1) / 2
    return spec.absorbed_flops(pairs) - spec.expanded_flops(pairs, past)


def long_prompts(
    sequences: Sequence[SequenceSpan], spec: Latent, piece_tokens: int
) -> list[LongPrompt]:
    """The prompts of a step that are to attend so, in flat order; none where it does not pay.

    Args:
        sequences: of the step.
        spec: what its layers cache.
        piece_tokens: most tokens of a prompt, and of a piece; longer ones are cut.
    """
    if not can_expand(spec.expanded):
        return []
    saved = [
        (saved_operations(spec, prompt.num_tokens, prompt.past), prompt)
        for seq in sequences
        if seq.num_tokens > 1
        for prompt in _cut(seq, piece_tokens)
    ]
    most = sorted(saved, key=lambda each: -each[0])[:MOST_PROMPTS]
    most = [each for each in most if each[0] >= _PROMPT_OPERATIONS]
    if sum(operations for operations, _ in most) < _LAUNCH_OPERATIONS:
        return []
    return sorted((prompt for _, prompt in most), key=lambda prompt: prompt.rows.start)


def rows_between(prompts: Sequence[LongPrompt], num_rows: int) -> list[slice]:
    """The runs of a step's rows that belong to none of `prompts`, which are in flat order."""
    ends = [0, *[prompt.rows.stop for prompt in prompts]]
    starts = [*[prompt.rows.start for prompt in prompts], num_rows]
    return [slice(a, b) for a, b in zip(ends, starts, strict=True) if a < b]


def _cut(seq: SequenceSpan, size: int) -> list[LongPrompt]:
    past = seq.context_len - seq.num_tokens
    starts = range(0, seq.num_tokens, size)
    return [
        LongPrompt(
            slice(seq.start + first, seq.start + min(first + size, seq.num_tokens)),
            past + first,
            seq.block_table,
            size,
        )
        for first in starts
    ]
