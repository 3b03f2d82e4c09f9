"""What each token of a step sees, and where the blocks of that are listed."""

from hotset.attention.batch import SequenceSpan
from hotset.attention.sparse.tables import token_tables


def test_each_token_sees_its_own_sequence_up_to_itself() -> None:
    decode, prompt = SequenceSpan(0, 1, 9, [4, 2, 7]), SequenceSpan(1, 3, 5, [0, 3])
    alone = SequenceSpan(4, 2, 2, [5])

    tables = token_tables([decode, prompt, alone])

    assert tables.block_ids.tolist() == [4, 2, 7, 0, 3, 5]
    assert tables.starts.tolist() == [0, 3, 3, 3, 5, 5]
    assert tables.lengths.tolist() == [9, 3, 4, 5, 1, 2]
    assert {table.dtype.name for table in tables} == {"int32"}


def test_a_step_of_no_sequence_has_empty_tables() -> None:
    assert [len(table) for table in token_tables([])] == [0, 0, 0]
