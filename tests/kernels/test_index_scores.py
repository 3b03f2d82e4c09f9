"""Scores over paged keys and the rows of a selection, in Triton's interpreter without a GPU."""

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.attention.sparse.select import score_keys, select_positions  # noqa: E402
from hotset.cost.cache_spec import KEYS_ALONE  # noqa: E402
from hotset.kernels.index_scores import PagedTokens, find_rows, score_paged_keys  # noqa: E402

BLOCK_SIZE, NUM_BLOCKS = 8, 64
# Triton's interpreter multiplies no bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]


def make_sequences(lengths: list[list[int]]) -> tuple[list[list[int]], PagedTokens]:
    """Blocks for each sequence, no two alike; `lengths` are what the tokens of each see."""
    order = iter(torch.randperm(NUM_BLOCKS).tolist())
    tables = [[next(order) for _ in range(-(-max(seen) // BLOCK_SIZE))] for seen in lengths]
    flat, starts = [block for table in tables for block in table], []
    first = 0
    for table, seen in zip(tables, lengths, strict=True):
        starts += [first] * len(seen)
        first += len(table)
    values = (flat, starts, [length for seen in lengths for length in seen])
    return tables, PagedTokens(*(torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in values))


# Decodes, the tokens of prompts, one that sees itself alone, and contexts of more than one tile.
LENGTHS = [
    [[1]],
    [[200], [7], [129]],
    [[5, 6, 7, 8, 9, 10], [130, 131], [64]],
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("num_heads", "dim"), [(1, 16), (8, 32), (64, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_the_reference_and_nothing_else_is_written(
    lengths: list[list[int]], num_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    count = 6
    tables, tokens = make_sequences(lengths)
    num_tokens, width = len(tokens.lengths), 256
    # A layer's keys are a strided view of the pool.
    pool = torch.randn(NUM_BLOCKS, 3, BLOCK_SIZE, dim, device=DEVICE).to(dtype)
    keys = pool[:, 1]
    query = torch.randn(num_tokens, num_heads, dim, device=DEVICE).to(dtype)
    weights = torch.randn(num_tokens, num_heads, device=DEVICE)
    scores = torch.full((num_tokens, width), 777.0, device=DEVICE)

    score_paged_keys(query, weights, keys, tokens, scores, count=count)

    token = 0
    for table, seen in zip(tables, lengths, strict=True):
        own = keys[torch.tensor(table, device=DEVICE)].flatten(0, 1)
        for length in seen:
            num_scored = length if length > count else 0
            expected = score_keys(query[token, None], weights[token, None], own[:num_scored])
            torch.testing.assert_close(
                scores[token, None, :num_scored], expected, rtol=1e-5, atol=1e-3
            )
            assert (scores[token, num_scored:] == 777.0).all()
            token += 1


def test_a_score_of_zero_has_no_sign() -> None:
    _, tokens = make_sequences([[9]])
    keys = -torch.ones(NUM_BLOCKS, BLOCK_SIZE, 16, device=DEVICE)
    scores = torch.ones(1, 16, device=DEVICE)

    score_paged_keys(
        torch.ones(1, 1, 16, device=DEVICE),
        -torch.ones(1, 1, device=DEVICE),
        keys,
        tokens,
        scores,
        count=1,
    )

    assert not scores[0, :9].any()
    assert not scores.signbit().any()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("count", "rows_per_token"), [(3, 1), (16, 3)])
def test_rows_are_where_the_selected_positions_lie(
    lengths: list[list[int]], count: int, rows_per_token: int
) -> None:
    torch.manual_seed(1)
    tables, tokens = make_sequences(lengths)
    scores = torch.randn(len(tokens.lengths), 256, device=DEVICE)
    positions = select_positions(scores, tokens.lengths, count)
    rows = torch.full_like(positions, -7)

    find_rows(
        positions,
        tokens,
        rows,
        block_size=BLOCK_SIZE,
        rows_per_block=3 * BLOCK_SIZE,
        rows_per_token=rows_per_token,
    )

    owners = [table for table, seen in zip(tables, lengths, strict=True) for _ in seen]
    for table, chosen, found in zip(owners, positions.tolist(), rows.tolist(), strict=True):
        assert found == [
            -1
            if at < 0
            else table[at // BLOCK_SIZE] * 3 * BLOCK_SIZE + at % BLOCK_SIZE * rows_per_token
            for at in chosen
        ]


def test_a_position_in_a_block_with_index_keys_alone_has_no_row() -> None:
    values = [4, 7 | KEYS_ALONE, 6], [0], [24]
    tokens = PagedTokens(*(torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in values))
    positions = torch.tensor([[0, 9, 23, -1]], dtype=torch.int32, device=DEVICE)
    rows = torch.zeros_like(positions)

    find_rows(positions, tokens, rows, block_size=8, rows_per_block=8, rows_per_token=1)

    assert rows.tolist() == [[32, -1, 55, -1]]


def test_a_block_with_index_keys_alone_is_read_where_its_own_are() -> None:
    torch.manual_seed(4)
    _, tokens = make_sequences([[60, 61, 62]])
    flagged = tokens._replace(block_ids=tokens.block_ids | KEYS_ALONE)
    keys = torch.randn(NUM_BLOCKS, BLOCK_SIZE, 16, device=DEVICE)
    query, weights = torch.randn(3, 2, 16, device=DEVICE), torch.randn(3, 2, device=DEVICE)
    scores, same = torch.zeros(2, 3, 64, device=DEVICE)

    score_paged_keys(query, weights, keys, tokens, scores, count=1)
    score_paged_keys(query, weights, keys, flagged, same, count=1)

    assert scores.any() and torch.equal(scores, same)


def test_a_part_of_the_tokens_scores_as_all_do() -> None:
    torch.manual_seed(2)
    _, tokens = make_sequences([[60, 61, 62], [33]])
    keys = torch.randn(NUM_BLOCKS, BLOCK_SIZE, 16, device=DEVICE)
    query = torch.randn(4, 2, 16, device=DEVICE)
    weights = torch.randn(4, 2, device=DEVICE)
    whole, parts = torch.zeros(2, 4, 64, device=DEVICE)

    score_paged_keys(query, weights, keys, tokens, whole, count=1)
    for first, end in ((0, 1), (1, 4)):
        part = slice(first, end)
        score_paged_keys(
            query[part], weights[part], keys, tokens.rows(first, end), parts[part], count=1
        )

    assert torch.equal(whole, parts)
