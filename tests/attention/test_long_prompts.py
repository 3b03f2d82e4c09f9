"""Which prompts attend to keys and values in place of latents, and in what pieces."""

import random

import pytest

from hotset.attention.batch import SequenceSpan
from hotset.attention.flashinfer.long_prompts import (
    MOST_PROMPTS,
    PIECE_TOKENS,
    LongPrompt,
    long_prompts,
    rows_between,
    saved_operations,
)
from hotset.cost.cache_spec import KeysValues, Latent

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
    assert saved_operations(V3, tokens, past) == absorbed - expanded


@pytest.mark.parametrize(
    ("lengths", "spec", "expected"),
    [
        ([(1024, 0)], V3, 0),  # saves less than to launch costs
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
    assert len(long_prompts(spans, spec)) == expected


@pytest.mark.parametrize("seed", range(10))
def test_each_row_belongs_to_one_prompt_or_run_and_each_token_seen_to_one_piece(seed: int) -> None:
    rng = random.Random(seed)
    spans, start = [], 0
    for _ in range(rng.randint(1, 9)):
        tokens, past = rng.choice([1, rng.randint(2, 5000)]), rng.randrange(20_000)
        spans.append(SequenceSpan(start, tokens, past + tokens, [start]))
        start += tokens
    prompts = long_prompts(spans, V3)
    rows = [row for prompt in prompts for row in range(prompt.rows.start, prompt.rows.stop)]
    rows += [row for run in rows_between(prompts, start) for row in range(run.start, run.stop)]
    assert sorted(rows) == list(range(start))
    for prompt in prompts:
        own = next(s for s in spans if s.block_table == prompt.block_table)
        assert prompt.past == own.context_len - own.num_tokens + prompt.rows.start - own.start
        *before, last = prompt.pieces
        assert last == (prompt.past, prompt.num_tokens, True)
        seen = [token for piece in before for token in range(piece.first, piece.first + piece[1])]
        assert seen == list(range(prompt.past))
        assert all(piece.num_tokens <= PIECE_TOKENS for piece in prompt.pieces)
        assert len({piece.num_tokens for piece in before}) <= 2


def test_runs_of_rows_leave_out_prompts_side_by_side() -> None:
    prompts = [LongPrompt(slice(2, 5), 0, []), LongPrompt(slice(5, 9), 0, [])]
    assert rows_between(prompts, 12) == [slice(0, 2), slice(9, 12)]
    assert rows_between(prompts, 9) == [slice(0, 2)]
