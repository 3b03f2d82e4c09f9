"""Decodes that read paged KV in place on a CPU: those of softmax, whatever shares the step."""

import pytest
import torch

from hotset.attention import paged_decodes
from hotset.attention.batch import SequenceSpan
from hotset.attention.paged_decodes import PagedDecodes, PagedShape, can_attend

pytest.importorskip("llvmlite", reason="the extra `cpu` is not installed")
SIZE, NUM_KV_HEADS = 16, 2


def spans(lengths: list[int], generator: torch.Generator) -> list[SequenceSpan]:
    """Sequences of one query each, with blocks of their own in no order."""
    widths = [-(-length // SIZE) for length in lengths]
    blocks = torch.randperm(sum(widths), generator=generator).tolist()
    tables = [[blocks.pop() for _ in range(width)] for width in widths]
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    return [
        SequenceSpan(row, 1, length, table)
        for row, length, table in zip(rows, lengths, tables, strict=True)
    ]


@pytest.mark.parametrize(("group", "dims"), [(1, (16, 16)), (3, (64, 64)), (7, (32, 48))])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_outputs_are_those_of_softmax_over_the_visible_tokens(
    group: int, dims: tuple[int, int], window: int | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    sequences = spans([1, 15, 16, 17, 70], generator)
    num_blocks = sum(len(s.block_table) for s in sequences)
    keys, values = torch.full((num_blocks, 2, SIZE, NUM_KV_HEADS, 64), torch.nan).unbind(1)
    query = torch.randn(len(sequences), group * NUM_KV_HEADS, dims[0], generator=generator)
    query = query.transpose(0, 1) * 4  # some scores are far below the largest
    output = torch.empty(len(sequences), group * NUM_KV_HEADS, dims[1])
    expected = torch.empty_like(output)
    for s in sequences:
        one = torch.randn(s.context_len, NUM_KV_HEADS, dims[0], generator=generator)
        two = torch.randn(s.context_len, NUM_KV_HEADS, dims[1], generator=generator)
        for position in range(s.context_len):
            block, place = s.block_table[position // SIZE], position % SIZE
            keys[block, place, :, : dims[0]] = one[position]
            values[block, place, :, : dims[1]] = two[position]
        one, two = one[-(window or 0) :], two[-(window or 0) :]
        wide = one.repeat_interleave(group, 1).double()
        scores = torch.einsum("hd,shd->hs", query[:, s.start].double(), wide) * 0.3
        wide = two.repeat_interleave(group, 1).double()
        expected[s.start] = torch.einsum("hs,shd->hd", scores.softmax(-1), wide).float()

    PagedDecodes(sequences, window, SIZE).attend(query, keys, values, output, 0.3)

    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    alone = torch.empty_like(output)
    for s in sequences:  # the same bits without the others
        PagedDecodes([s], window, SIZE).attend(query, keys, values, alone, 0.3)
    assert torch.equal(alone, output)


def test_code_that_fails_its_trial_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape = PagedShape(2, 16, 16, 16)
    assert not can_attend(PagedShape(2, 24, 16, 16))  # no whole vectors
    monkeypatch.setattr(paged_decodes, "_trial", lambda shape: 1e-3)
    assert not can_attend.__wrapped__(shape)
    assert "ours are wrong by 1.0e-03" in caplog.text
    monkeypatch.setattr(paged_decodes, "_trial", lambda shape: float("nan"))
    assert not can_attend.__wrapped__(shape)
    monkeypatch.undo()
    assert can_attend(shape)
