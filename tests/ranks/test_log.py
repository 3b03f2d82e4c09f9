"""What is read from the log is what was written, whatever tables did in between."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.attention.batch import NUM_INPUTS, Batch, SequenceSpan
from hotset.executor.step_input import SampleInput, StepInput, Together
from hotset.ranks.log import Op, StepReader, StepWriter, command, commands, key_numbers, key_of

TABLE = st.lists(st.integers(0, 2**31), max_size=6)
# By step: sequences that go on (with a table that is new, longer or another), and those that end.
STEPS = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 3), TABLE, max_size=4), st.sets(st.integers(0, 3))),
    max_size=8,
)


def make_step(tables: dict[int, list[int]], number: int) -> StepInput:
    spans = [
        SequenceSpan(i, 1, 10 + number, table, number, i + 2, [(i, number)] * (i % 3), sequence_id)
        for i, (sequence_id, table) in enumerate(tables.items())
    ]
    inputs = np.arange(NUM_INPUTS * len(spans)).reshape(NUM_INPUTS, -1) + number
    rows = np.arange(len(spans))
    batch = Batch(inputs, rows, rows[:0], spans, len(spans), number % 2 == 1, number % 4)
    together = Together(number, 9, number % 3 == 1, number % 2 == 1) if number % 4 else None
    copies = [(number, 1)] * (number % 3)
    return StepInput((), batch, SampleInput(), copies=copies, together=together)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_steps_are_read_as_they_were_written(
    steps: list[tuple[dict[int, list[int]], set[int]]],
) -> None:
    writer, reader = StepWriter(), StepReader()
    for number, (tables, ended) in enumerate(steps):
        step = make_step(tables, number)
        message = writer.step(step).tobytes() + writer.release(sorted(ended)).tobytes()
        (op, numbers), (released, ids) = commands(message)
        assert (op, released) == (Op.STEP, Op.RELEASE)
        read = reader.step(numbers)
        assert read.batch.sequences == step.batch.sequences
        assert np.array_equal(read.batch.inputs, step.batch.inputs)
        assert np.array_equal(read.batch.sampled_rows, step.batch.sampled_rows)
        assert not len(read.batch.scored_rows)
        assert (read.batch.num_decodes, read.batch.has_unknown) == (len(tables), number % 2 == 1)
        assert read.copies == step.copies
        assert read.together == step.together
        assert read.batch.num_padding == step.batch.num_padding
        reader.release(ids)


def test_a_table_that_grows_is_sent_once() -> None:
    writer = StepWriter()
    table = list(range(500))
    first = writer.step(make_step({7: table}, 0))
    again = writer.step(make_step({7: [*table, 500]}, 0))
    assert len(first) - len(again) == 499


@given(st.binary(max_size=40))
def test_keys_are_read_as_they_were_written(key: bytes) -> None:
    [(op, numbers)] = commands(command(Op.WRITE, (1, 2, 3), key_numbers(key)).tobytes())
    assert (op, numbers[:3].tolist(), key_of(numbers[3:])) == (Op.WRITE, [1, 2, 3], key)
