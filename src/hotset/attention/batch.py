"""One step's tokens and sequences as flat arrays. Imports numpy, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]

# Rows of `Batch.inputs`.
TOKEN, POSITION, BLOCK, OFFSET, SOURCE, SEAT = range(6)
NUM_INPUTS = 6


class SequenceSpan(NamedTuple):
    """One request's part of a step: tokens `[start, start + num_tokens)` of the flat batch.

    Attributes:
        context_len: tokens it attends to, with those of this step.
        block_table: the blocks of those, in token order.
        state_read: slot with its state before the step, of a model that has some.
        state_write: slot for its state after the step, which may be the same.
        cuts: after how many of its tokens the state goes to which further slots, in order.
        sequence_id: whose; -1 where no sequence goes on after the step.
    """

    start: int
    num_tokens: int
    context_len: int
    block_table: Sequence[int]
    state_read: int = 0
    state_write: int = 1
    cuts: Sequence[tuple[int, int]] = ()
    sequence_id: int = -1

    def visible(self, window: int | None, block_size: int) -> tuple[int, list[int]]:
        """The first position that its first token sees, and the blocks from that one on.

        Args:
            window: tokens that a token sees, itself the last; None is all.
            block_size: tokens of a block.
        """
        first = 0
        if window is not None:
            first = max(0, self.context_len - self.num_tokens - window + 1)
        end = -(-self.context_len // block_size)
        return first, list(self.block_table[first // block_size : end])


@dataclass(frozen=True, slots=True)
class Batch:
    """A step in flat order: sequences of one token first, as other kernels attend those.

    Attributes:
        inputs: `[6, T]` int64: token ids; positions; blocks that the tokens' KV goes to, and
            places in these; rows among the tokens that the step before chose, for the tokens that
            the host does not know yet, -1 for the others; and seats, -1 where the request is not
            hot. See `Inputs`.
        sampled_rows: `[R]` int64, the last row of each item that samples, in the order of items.
        scored_rows: `[P]` int64, the rows whose logits tell log-probabilities of prompts, in the
            order of items.
        sequences: one for each item, in flat order.
        num_decodes: how many leading sequences have one token.
        has_unknown: whether any token is still being chosen on the device.
        num_padding: how many of the last tokens are of no sequence.
    """

    inputs: Array
    sampled_rows: Array
    scored_rows: Array
    sequences: list[SequenceSpan]
    num_decodes: int
    has_unknown: bool
    num_padding: int = 0

    @property
    def num_tokens(self) -> int:
        """T, with padding."""
        return int(self.inputs.shape[1])

    @property
    def num_attending(self) -> int:
        """Of these, those of sequences, which come first."""
        return self.num_tokens - self.num_padding

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one token, and all of them sample."""
        return self.num_decodes == len(self.sequences) == len(self.sampled_rows)
