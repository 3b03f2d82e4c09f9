"""What FlashInfer is told of latents, over many random steps, and which of them it takes."""

import random

import pytest

from hotset.attention.batch import SequenceSpan
from hotset.attention.flashinfer.latent_rows import (
    make_rows,
    most_rows,
    parts,
    scratch_rows,
    why_not_planned,
)
from hotset.cost.cache_spec import KeysValues, Latent

V3 = Latent(512, 64, KeysValues(128, 192, 128))


@pytest.mark.parametrize("seed", range(20))
def test_each_token_is_a_row_that_attends_to_itself_and_what_is_before_it(seed: int) -> None:
    rng = random.Random(seed)
    spans, start = [], 0
    for _ in range(rng.randint(1, 8)):
        num_tokens = rng.choice([1, rng.randint(1, 20)])
        context = num_tokens + rng.randrange(60)
        blocks = [rng.randrange(99) for _ in range(-(-context // 4))]
        spans.append(SequenceSpan(start, num_tokens, context, blocks))
        start += num_tokens
    rows = make_rows(spans)
    assert rows.query_starts.tolist() == list(range(start + 1))
    assert len(rows.lens) == start == len(rows.block_starts) - 1
    assert rows.block_starts[-1] == len(rows.block_ids)
    for span in spans:
        for i in range(span.num_tokens):
            row = span.start + i
            assert rows.lens[row] == span.context_len - span.num_tokens + i + 1
            first = rows.block_starts[row]
            table = rows.block_ids[first : first + len(span.block_table)]
            assert table.tolist() == list(span.block_table)
    assert all(table.dtype == "int32" for table in rows)


def test_scratch_rows_read_one_token_of_the_scratch_block() -> None:
    rows = scratch_rows(3, 7)
    assert rows.lens.tolist() == [1, 1, 1]
    assert [rows.block_ids[first] for first in rows.block_starts[:3]] == [7, 7, 7]


@pytest.mark.parametrize("num_heads", [1, 16, 20, 64, 65, 96, 128, 129, 192, 256])
def test_a_plan_of_most_rows_has_room_for_its_works_and_one_more_row_has_not(
    num_heads: int,
) -> None:
    tile_rows = 128 if num_heads > 64 else 64  # `MLAPlan`: two blocks share a tile above 64
    works_per_row = -(-num_heads // tile_rows)
    most = most_rows(num_heads)
    assert most * works_per_row + 256 <= 16384 < (most + 1) * works_per_row + 256


@pytest.mark.parametrize(("num_rows", "most"), [(1, 5), (5, 5), (6, 5), (23, 5)])
def test_parts_cover_all_rows_once(num_rows: int, most: int) -> None:
    found = parts(num_rows, most)
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(num_rows))
    assert max(part.stop - part.start for part in found) <= most


@pytest.mark.parametrize(
    ("spec", "dtype", "capability", "reason"),
    [
        (V3, "bfloat16", (9, 0), None),
        (V3, "float16", (9, 0), None),
        (Latent(512, 64, KeysValues(20, 256, 256)), "bfloat16", (9, 0), None),
        (V3, "float32", (9, 0), "latents of float32"),
        (V3, "bfloat16", (8, 0), "compute capability 8.0"),
        (V3, "bfloat16", (10, 0), "compute capability 10.0"),
        (Latent(256, 32, KeysValues(40, 96, 64)), "bfloat16", (9, 0), "latents of 256 and 32"),
        (Latent(512, 64, KeysValues(8, 100, 64)), "bfloat16", (9, 0), "keys of 100 numbers"),
        (KeysValues(8, 128, 128), "bfloat16", (9, 0), "a layer without latents"),
    ],
)
def test_latents_that_the_kernel_does_not_take_are_named(
    spec: Latent, dtype: str, capability: tuple[int, int], reason: str | None
) -> None:
    said = why_not_planned(spec, dtype, capability)
    assert (said is None) if reason is None else (said is not None and reason in said)
