"""Limits, tables and padding of recorded attention, over many random steps."""

import random

import pytest

from hotset.attention.batch import SequenceSpan
from hotset.attention.flashinfer.limits import most_recorded_seqs, most_widened_blocks
from hotset.attention.flashinfer.tables import fits, make_tables, padded, scratch_step
from hotset.cost.workspace import KERNEL_WORKSPACE_BYTES

SCRATCH = 999


def random_sequences(rng: random.Random, block_size: int) -> list[SequenceSpan]:
    """Up to 8 sequences, one after another, each with the blocks that its context takes."""
    spans, start = [], 0
    for _ in range(rng.randrange(9)):
        num_tokens = rng.randint(1, 20)
        context = num_tokens + rng.randrange(60)
        blocks = [rng.randrange(SCRATCH) for _ in range(-(-context // block_size))]
        spans.append(SequenceSpan(start, num_tokens, context, blocks))
        start += num_tokens
    return spans


@pytest.mark.parametrize("seed", range(20))
def test_a_kernel_finds_each_sequence_where_it_is_and_nothing_beyond(seed: int) -> None:
    rng = random.Random(seed)
    block_size, first_row = rng.choice([1, 4, 16]), rng.randrange(5)
    spans = random_sequences(rng, block_size)
    size = len(spans) + rng.randrange(4)
    tables = make_tables(spans, block_size, size=size, first_row=first_row)
    for i, span in enumerate(spans):
        begin, end = tables.block_starts[i : i + 2]
        assert tables.block_ids[begin:end].tolist() == list(span.block_table)
        assert (end - begin - 1) * block_size + tables.last_lens[i] == span.context_len
        begin, end = tables.query_starts[i : i + 2]
        assert (begin, end) == (first_row + span.start, first_row + span.start + span.num_tokens)
    assert len(tables.last_lens) == size == len(tables.query_starts) - 1
    assert set(tables.query_starts[len(spans) :].tolist()) == {tables.query_starts[-1]}
    assert set(tables.block_starts[len(spans) :].tolist()) == {len(tables.block_ids)}


@pytest.mark.parametrize("seed", range(20))
def test_a_copy_holds_the_prompts_that_fit_to_the_block(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    spans = random_sequences(rng, block_size)
    needed = len(make_tables(spans, block_size).block_ids)
    assert fits(spans, block_size, needed)
    assert not fits(spans, block_size, needed - 1)


@pytest.mark.parametrize("num_decodes", range(6))
def test_a_recorded_step_of_decodes_always_has_its_size(num_decodes: int) -> None:
    spans = [SequenceSpan(i, 1, 7 * i + 1, [i]) for i in range(num_decodes)]
    rows = padded(spans, 5, SCRATCH)
    assert len(rows) == 5 and rows[:num_decodes] == spans
    padding = SequenceSpan(0, 1, 1, [SCRATCH])
    assert all(row == padding for row in rows[num_decodes:])


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 200])
@pytest.mark.parametrize("num_seqs", [1, 8, 300])
def test_a_mixed_step_is_recorded_with_as_much_as_any_step_of_its_size(
    num_tokens: int, num_seqs: int
) -> None:
    decodes, [prompt] = scratch_step(num_tokens, num_seqs, 16, SCRATCH)
    assert len(decodes) == min(num_tokens, num_seqs)
    assert prompt.num_tokens == prompt.context_len == num_tokens
    assert len(prompt.block_table) * 16 >= num_tokens > (len(prompt.block_table) - 1) * 16
    assert {block for span in [*decodes, prompt] for block in span.block_table} == {SCRATCH}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("group", [1, 4, 7, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_partial_results_of_most_sequences_fill_the_workspace_and_do_not_pass_it(
    num_kv_heads: int, group: int, head_dim: int
) -> None:
    heads = num_kv_heads * group
    tile = next(rows for rows in (16, 64, 128) if rows >= group)

    def num_bytes(num_seqs: int) -> int:
        """As FlashInfer allocates: a tile per sequence, and one per `tile` query rows."""
        num_tiles = -(-num_seqs * group // tile) + num_seqs - 1
        return 4 * heads * num_tiles * tile * (head_dim + 1)

    most = most_recorded_seqs(heads, num_kv_heads, head_dim)
    assert num_bytes(most) <= KERNEL_WORKSPACE_BYTES < num_bytes(most + 3)


@pytest.mark.parametrize(("block_values", "itemsize"), [(1, 2), (4096, 2), (3001, 2), (10**6, 4)])
@pytest.mark.parametrize("num_bytes", [1, 4096, 10**6, 256 * 2**20])
def test_a_copy_has_one_block_at_least_and_else_no_more_bytes_than_it_may(
    block_values: int, itemsize: int, num_bytes: int
) -> None:
    most, block_bytes = (
        most_widened_blocks(block_values, itemsize, num_bytes),
        block_values * itemsize,
    )
    assert most >= 1 and (most + 1) * block_bytes > num_bytes
    assert most == 1 or most * block_bytes <= num_bytes
