"""The slots and chunks of a step as flat tables, for kernels. Imports numpy, no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hotset.attention.batch import SequenceSpan
from hotset.sequence import IN_CHUNKS, NO_SEQUENCE, ZEROS_SLOT

Array = npt.NDArray[Any]

# Chunks lie between multiples of this position, wherever a text was cut: what is computed does not
# depend on the cuts then.
GRID = 64
NUM_COLUMNS = 3  # of each of the tables

# Of recorded steps: the most sequences of several tokens, and chunks of these beside whole ones. A
# sequence begins and ends within a chunk, and is cut at up to three places.
_MOST_PROMPTS = 32
_PARTS_PER_PROMPT = 5


@dataclass(frozen=True, slots=True)
class TableSizes:
    """How long the tables of a step are.

    Attributes:
        decodes: number of leading tokens that have all sequences of one token.
        tokens: T of `RowTable`.
        chunks: C of `ChunkTable`.
        sequences: S of `SequenceTable`.
        pads: whether tokens of padding may follow the tokens of sequences.
    """

    decodes: int
    tokens: int
    chunks: int
    sequences: int
    pads: bool = False

    @classmethod
    def of_recorded(cls, num_tokens: int, most_seqs: int, *, is_decode: bool) -> "TableSizes":
        """The sizes of a recorded step; steps that need larger ones are launched."""
        if is_decode:
            return cls(num_tokens, num_tokens, 0, 0, pads=True)
        prompts = min(_MOST_PROMPTS, num_tokens // 2)
        chunks = num_tokens // GRID + _PARTS_PER_PROMPT * prompts
        return cls(min(num_tokens, most_seqs), num_tokens, chunks, prompts, pads=True)

    @property
    def parts(self) -> tuple[int, int, int]:
        """Numbers in each table."""
        return (
            NUM_COLUMNS * self.tokens,
            NUM_COLUMNS * self.chunks,
            NUM_COLUMNS * self.sequences,
        )

    def hold(self, other: "TableSizes") -> bool:
        """Whether a step with those tables can run with these."""
        return (
            other.decodes <= self.decodes
            and other.tokens <= self.tokens
            and other.chunks <= self.chunks
            and other.sequences <= self.sequences
        )


class SpanTables:
    """The tables of one step.

    Args:
        spans: of the step, in order.
        num_decodes: how many leading ones have one token.

    Attributes:
        sizes: what they need.
        copies: `[n, 2]` slots, from and to: states after the step that go to one more slot.
    """

    def __init__(self, spans: Sequence[SequenceSpan], num_decodes: int) -> None:
        decodes, prompts = spans[:num_decodes], spans[num_decodes:]
        num_tokens = num_decodes + sum(span.num_tokens for span in prompts)
        self._rows = np.full((NUM_COLUMNS, num_tokens), IN_CHUNKS, np.int32)
        self._rows[0, :num_decodes] = [span.state_read for span in decodes]
        self._rows[1, :num_decodes] = [span.state_write for span in decodes]
        self._rows[2, :num_decodes] = 0
        chunks: list[tuple[int, int, int]] = []
        self._sequences = np.zeros((NUM_COLUMNS, len(prompts)), np.int32)
        for index, span in enumerate(prompts):
            first = len(chunks)
            chunks += chunks_of(span)
            self._sequences[:, index] = span.state_read, first, len(chunks)
            own = slice(span.start, span.start + span.num_tokens)
            self._rows[0, own] = span.state_read
            self._rows[2, own] = np.arange(span.num_tokens)
        self._chunks = np.array(chunks, np.int32).reshape(-1, NUM_COLUMNS).T
        self.sizes = TableSizes(num_decodes, num_tokens, len(chunks), len(prompts))
        copies = [(span.state_write, slot) for span in decodes for _, slot in span.cuts]
        self.copies = np.array(copies, np.int64).reshape(-1, 2)

    def packed(self, sizes: TableSizes) -> Array:
        """The columns of all tables one after another, int32.

        Tokens beyond the step's read zeros and write nothing; chunks and sequences beyond are none.
        """
        values = np.zeros(sum(sizes.parts), np.int32)
        rows, chunks, sequences = (
            part.reshape(NUM_COLUMNS, -1) for part in np.split(values, np.cumsum(sizes.parts)[:-1])
        )
        rows[:, : self.sizes.tokens] = self._rows
        rows[:, self.sizes.tokens :] = [[ZEROS_SLOT], [NO_SEQUENCE], [0]]
        chunks[:, : self.sizes.chunks] = self._chunks
        chunks[2, self.sizes.chunks :] = -1
        sequences[:, : self.sizes.sequences] = self._sequences
        return values


def chunks_of(span: SequenceSpan) -> Iterator[tuple[int, int, int]]:
    """(First row, tokens, slot for the state after them or -1) of a sequence's chunks, in order.

    It is cut where positions are multiples of `GRID`, and at its cuts. A chunk of no token writes
    the same state to one more slot.
    """
    row, position = span.start, span.context_len - span.num_tokens
    for count, slot in (*span.cuts, (span.num_tokens, span.state_write)):
        end = span.start + count
        while row + GRID - position % GRID < end:
            size = GRID - position % GRID
            yield row, size, -1
            row, position = row + size, position + size
        yield row, end - row, slot
        row, position = end, position + end - row
