"""Which prompts attend to keys and values in place of latents, and in what pieces."""

import random

import pytest

from hotset.attention.batch import SequenceSpan
from hotset.attention.flashinfer.latent_rows import LATENT_WORKSPACE_BYTES
from hotset.attention.flashinfer.long_prompts import (
    MOST_PROMPTS,
    LongPrompt,
    long_prompts,
    most_piece_tokens,
    rows_between,
    saved_operations,
)
from hotset.cost.cache_spec import KeysValues, Latent
from hotset.cost.workspace import EXPANDED_BYTES, WORKSPACE_BYTES

V3 = Latent(512, 64, KeysValues(128, 192, 128))
GLM = Latent(512, 64, KeysValues(20, 256, 256))
NARROW = Latent(512, 64, KeysValues(16, 80, 16))


@pytest.mark.parametrize(("spec", "least"), [(V3, 171), (GLM, 398)])
def test_a_prompt_pays_from_the_number_of_tokens_on_that_the_page_names(
    spec: Latent, least: int
) -> None:
    past = 10**6  # the formula counts tokens behind the prompt alone
    assert saved_operations(spec, least + 1, past) > 0 > saved_operations(spec, least - 1, past)


def test_what_is_saved_is_absorbed_less_expanded() -> None:
    tokens, past, heads = 1000, 5000, 128
    pairs = sum(past + i + 1 for i in range(tokens))
    absorbed = 2 * heads * (2 * 512 + 64) * pairs
    expanded = 2 * heads * (192 + 128) * pairs + 2 * 512 * heads * (128 + 128) * (past + tokens)
    to_absorb = 2 * heads * 512 * 128 * tokens
    to_turn_into_values = 2 * heads * 512 * 128 * tokens
    expected = absorbed + to_absorb + to_turn_into_values - expanded
    assert saved_operations(V3, tokens, past) == expected


@pytest.mark.parametrize(
    ("lengths", "spec", "expected"),
    [
        ([(896, 0)], V3, 0),  # saves less than to launch costs
        ([(1024, 0)], V3, 1),
        ([(1024, 0), (200, 0)], V3, 1),  # the second saves less than its own launches cost
        ([(1024, 8192)], V3, 1),
        ([(1, 30000), (1024, 8192), (100, 9000)], V3, 1),
        ([(300, 9000)] * 6, V3, MOST_PROMPTS),
        ([(8192, 0)], V3, 4),
        ([(1, 30000)] * 8, V3, 0),
        ([(1024, 8192)], NARROW, 0),  # there is no such kernel
    ],
)
def test_prompts_are_chosen_where_they_pay_for_the_launch(
    lengths: list[tuple[int, int]], spec: Latent, expected: int
) -> None:
    spans, start = [], 0
    for tokens, past in lengths:
        spans.append(SequenceSpan(start, tokens, past + tokens, [0]))
        start += tokens
    assert len(long_prompts(spans, spec, 2048)) == expected


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(V3.expanded, 8192), (KeysValues(96, 192, 128), 10880), (KeysValues(20, 256, 256), 32768)],
)
def test_pieces_fill_the_memory_that_is_set_aside_by_whole_tiles(
    heads: KeysValues, expected: int
) -> None:
    assert most_piece_tokens(heads) == expected
    token_bytes = 2 * heads.num_kv_heads * (heads.key_dim + heads.value_dim)
    assert 0 <= EXPANDED_BYTES - expected * token_bytes < 128 * token_bytes
    plans = 8 * 2**20 * (3 * MOST_PROMPTS + 4)
    assert EXPANDED_BYTES + LATENT_WORKSPACE_BYTES + plans <= WORKSPACE_BYTES


def test_a_context_that_fits_is_one_piece_and_so_are_the_last_tokens_of_any() -> None:
    assert LongPrompt(slice(0, 5), 3, [], 8).pieces == [(0, 8, True)]
    assert LongPrompt(slice(0, 5), 4, [], 8).pieces == [(0, 4, False), (4, 5, True)]
    assert LongPrompt(slice(0, 2), 15, [], 8).pieces == [
        (0, 8, False),
        (8, 7, False),
        (15, 2, True),
    ]
    assert LongPrompt(slice(0, 3), 20, [], 8).pieces == [
        (0, 8, False),
        (8, 8, False),
        (16, 7, True),
    ]


@pytest.mark.parametrize("seed", range(10))
def test_each_row_belongs_to_one_prompt_or_run_and_each_token_seen_to_one_piece(seed: int) -> None:
    rng = random.Random(seed)
    spans, start = [], 0
    for _ in range(rng.randint(1, 9)):
        tokens, past = rng.choice([1, rng.randint(2, 5000)]), rng.randrange(20_000)
        spans.append(SequenceSpan(start, tokens, past + tokens, [start]))
        start += tokens
    prompts = long_prompts(spans, V3, 2048)
    rows = [row for prompt in prompts for row in range(prompt.rows.start, prompt.rows.stop)]
    rows += [row for run in rows_between(prompts, start) for row in range(run.start, run.stop)]
    assert sorted(rows) == list(range(start))
    for prompt in prompts:
        own = next(s for s in spans if s.block_table == prompt.block_table)
        assert prompt.past == own.context_len - own.num_tokens + prompt.rows.start - own.start
        *before, last = prompt.pieces
        seen = [token for first, count, _ in prompt.pieces for token in range(first, first + count)]
        assert seen == list(range(prompt.past + prompt.num_tokens))
        assert last.is_causal and last.num_tokens >= prompt.num_tokens
        assert not any(piece.is_causal for piece in before)
        assert all(piece.num_tokens <= 2048 for piece in prompt.pieces)
        assert len({piece.num_tokens for piece in before}) <= 2


def test_runs_of_rows_leave_out_prompts_side_by_side() -> None:
    prompts = [LongPrompt(slice(2, 5), 0, [], 9), LongPrompt(slice(5, 9), 0, [], 9)]
    assert rows_between(prompts, 12) == [slice(0, 2), slice(9, 12)]
    assert rows_between(prompts, 9) == [slice(0, 2)]
