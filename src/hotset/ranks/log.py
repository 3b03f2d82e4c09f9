"""The log of what the driver calls: flat arrays of whole numbers, as they are sent.

A message is one command after another, each its number, its length and as many int64. Blocks and
host slots have the same numbers on all ranks. The block table of a sequence is sent once, and then
what it grew by: each side keeps the same tables.

Imports numpy, no torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from enum import IntEnum
from itertools import islice

import numpy as np
import numpy.typing as npt

from hotset.attention.batch import NUM_INPUTS, Batch, SequenceSpan
from hotset.executor.step_input import SampleInput, StepInput, Together

Array = npt.NDArray[np.int64]

_SPAN = 9  # numbers of a sequence in a step


class Op(IntEnum):
    """What a rank does next."""

    STEP = 1  # compute it; see `StepWriter.step`
    COPY_BLOCKS = 2  # of the device: from, to
    RELEASE = 3  # the tables of these sequences
    MARK = 4  # note the compute submitted so far
    COPY = 5  # between device and host: id, whether to the host, runs
    ORDER = 6  # have compute wait for a copy: its id
    WARM_UP = 7  # do the next piece of it
    COUNT = 8  # report what experts did: a number that comes back
    WRITE = 9  # a host slot to disk: id, host slot, slot on disk, key
    READ = 10  # a slot on disk to a host slot, likewise
    END = 11  # nothing more of this engine


def command(op: Op, *parts: Iterable[int] | Array) -> Array:
    """One command."""
    arrays = [np.asarray(part, np.int64).reshape(-1) for part in parts]
    length = sum(map(len, arrays))
    return np.concatenate([np.array([op, length], np.int64), *arrays])


def commands(message: bytes) -> Iterator[tuple[Op, Array]]:
    """The commands of a message, in order."""
    numbers = np.frombuffer(message, np.int64)
    while len(numbers):
        end = 2 + int(numbers[1])
        yield Op(int(numbers[0])), numbers[2:end]
        numbers = numbers[end:]


_ONE_LANE = (0,) * 5  # in place of what lanes have in common


def _together(num_rows: int, num_chosen: int, is_decode: int, is_launched: int) -> Together:
    return Together(num_rows, num_chosen, bool(is_decode), bool(is_launched))


class StepWriter:
    """Makes the commands of steps."""

    def __init__(self) -> None:
        self._tables: dict[int, Sequence[int]] = {}  # as the ranks have them

    def step(self, step: StepInput) -> Array:
        """A step without how its tokens are chosen, which rank 0 does.

        Raises:
            NotImplementedError: it has seats of hot requests, which are not sent.
        """
        batch = step.batch
        if step.seats is not None:
            raise NotImplementedError("hot requests are not sent to other ranks")
        spans, new, cuts = [], list[int](), list[tuple[int, int]]()
        for span in batch.sequences:
            table = span.block_table
            known = self._tables.get(span.sequence_id, ())
            kept = len(known) if table[: len(known)] == known else 0
            states = (span.state_read, span.state_write, len(span.cuts))
            tokens = (span.start, span.num_tokens, span.context_len)
            spans.append((span.sequence_id, *tokens, kept, len(table), *states))
            new += table[kept:]
            cuts += span.cuts
            self._tables[span.sequence_id] = table
        counts = (
            batch.num_tokens,
            len(batch.sampled_rows),
            len(batch.scored_rows),
            len(spans),
            len(cuts),
            len(step.copies),
            batch.num_decodes,
            batch.has_unknown,
            batch.num_padding,
        )
        return command(
            Op.STEP,
            counts,
            _ONE_LANE if step.together is None else (1, *astuple(step.together)),
            batch.inputs,
            batch.sampled_rows,
            batch.scored_rows,
            np.array(spans, np.int64),
            np.array(cuts, np.int64),
            np.array(step.copies, np.int64),
            new,
        )

    def release(self, sequence_ids: Sequence[int]) -> Array:
        """Forget the tables of sequences that have ended."""
        for sequence_id in sequence_ids:
            self._tables.pop(sequence_id, None)
        return command(Op.RELEASE, sequence_ids)


def _pairs(numbers: Array) -> list[tuple[int, int]]:
    return [(first, second) for first, second in numbers.reshape(-1, 2).tolist()]


class StepReader:
    """Reads the commands that a `StepWriter` made, all of them and in order."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def step(self, numbers: Array) -> StepInput:
        """The step of a `STEP`; its tables are valid until the next one is read."""
        counts, numbers = numbers[:14].tolist(), numbers[14:]
        num_tokens, num_sampled, num_scored, num_spans, num_cuts, num_copies = counts[:6]
        num_decodes, unknown, num_padding, has_lanes, *together = counts[6:]
        sizes = [NUM_INPUTS * num_tokens, num_sampled, num_scored]
        sizes += [_SPAN * num_spans, 2 * num_cuts, 2 * num_copies]
        inputs, sampled, scored, spans, cuts, copies, new = np.split(numbers, np.cumsum(sizes))
        sequences, start = [], 0
        left = iter(_pairs(cuts))
        for row in spans.reshape(-1, _SPAN).tolist():
            sequence_id, first, count, context_len, kept, length, read, write, cut_count = row
            table = self._tables.setdefault(sequence_id, [])
            del table[kept:]
            end = start + length - kept
            table += new[start:end].tolist()
            start = end
            tokens, states = (first, count, context_len), list(islice(left, cut_count))
            sequences.append(SequenceSpan(*tokens, table, read, write, states, sequence_id))
        batch = Batch(
            inputs.reshape(NUM_INPUTS, -1),
            sampled,
            scored,
            sequences,
            num_decodes,
            bool(unknown),
            num_padding,
        )
        lanes = _together(*together) if has_lanes else None
        return StepInput((), batch, SampleInput(), copies=_pairs(copies), together=lanes)

    def release(self, numbers: Array) -> None:
        """Read a `RELEASE`."""
        for sequence_id in numbers.tolist():
            self._tables.pop(sequence_id, None)


def key_numbers(key: bytes) -> Array:
    """A key as whole numbers, its length first."""
    padded = key + bytes(-len(key) % 8)
    return np.concatenate([np.array([len(key)], np.int64), np.frombuffer(padded, np.int64)])


def key_of(numbers: Array) -> bytes:
    """The key of `key_numbers`."""
    return numbers[1:].tobytes()[: int(numbers[0])]
