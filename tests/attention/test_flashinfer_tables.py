"""Block tables as FlashInfer takes them."""

import ast
import inspect

import numpy as np
import pytest

from hotset.attention.batch import SequenceSpan
from hotset.attention.flashinfer import wrappers
from hotset.attention.flashinfer.limits import most_recorded_seqs
from hotset.attention.flashinfer.tables import make_tables
from hotset.cost.workspace import KERNEL_WORKSPACE_BYTES

SEQUENCES = [
    SequenceSpan(0, 3, 9, [7, 2, 5]),
    SequenceSpan(3, 1, 4, [6]),
    SequenceSpan(4, 5, 5, [3, 0]),
]


@pytest.mark.parametrize("size", [0, 2, 3, 6])
def test_tables_are_those_of_the_sequences_and_empty_ones_after_them(size: int) -> None:
    tables = make_tables(SEQUENCES, 4, size=size)
    empty = max(0, size - 3)
    assert tables.query_starts.tolist() == [0, 3, 4, 9] + [9] * empty
    assert tables.block_starts.tolist() == [0, 3, 4, 6] + [6] * empty
    assert tables.block_ids.tolist() == [7, 2, 5, 6, 3, 0]
    assert tables.last_lens.tolist() == [1, 4, 1] + [0] * empty
    assert tables.query_starts.dtype == tables.block_starts.dtype == np.int32
    assert tables.block_ids.dtype == tables.last_lens.dtype == np.int32


def test_a_step_can_have_no_sequence_at_all() -> None:
    tables = make_tables([], 4, size=2)
    assert tables.query_starts.tolist() == tables.block_starts.tolist() == [0, 0, 0]
    assert tables.last_lens.tolist() == [0, 0] and len(tables.block_ids) == 0


@pytest.mark.parametrize(("heads", "kv_heads", "tile"), [(32, 8, 16), (64, 8, 16), (32, 1, 64)])
def test_partial_results_of_a_recorded_step_fit_into_the_workspace(
    heads: int, kv_heads: int, tile: int
) -> None:
    def num_bytes(num_seqs: int) -> int:
        """As FlashInfer allocates for a graph of so many sequences of one token."""
        num_tiles = -(-num_seqs * heads // kv_heads // tile) + num_seqs - 1
        return 4 * heads * num_tiles * tile * (128 + 1)

    most = most_recorded_seqs(heads, kv_heads, 128)
    assert num_bytes(most) <= KERNEL_WORKSPACE_BYTES < num_bytes(most + 3)
    assert most > 100


def test_every_wrapper_names_its_backend() -> None:
    """With `auto`, versions of FlashInfer choose among kernels that were never tried here."""
    tree = ast.parse(inspect.getsource(wrappers))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "NHD" in [getattr(a, "value", None) for a in node.args]
    ]
    assert len(calls) == 4
    for call in calls:
        assert "backend" in [keyword.arg for keyword in call.keywords], ast.unparse(call)
