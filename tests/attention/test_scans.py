"""Recurrences: one token after another, in chunks, and cut on the grid."""

from collections.abc import Callable

import pytest
import torch
from scans import HEADS, KEYS, VALUES, gated_delta, kimi_delta, mamba1, mamba2

from hotset.attention.scans import Scan
from hotset.attention.state_tables import GRID

SCANS = pytest.mark.parametrize("make", [gated_delta, kimi_delta, mamba1, mamba2])


def in_chunks(scan: Scan, ends: list[int], state: torch.Tensor) -> tuple[torch.Tensor, ...]:
    outputs, start = [], 0
    for end in ends:
        output, state = scan.chunk(start, end, state)
        outputs.append(output)
        start = end
    return torch.cat(outputs), state


@SCANS
def test_one_token_after_another_is_what_a_chunk_is(make: Callable[[int], Scan]) -> None:
    torch.manual_seed(0)
    scan = make(20)
    assert scan.state_shape == (1 if make is mamba1 else HEADS, VALUES, KEYS)
    state = torch.randn(scan.state_shape)
    expected, after = scan.chunk(0, 20, state)
    for row in range(20):
        # A step in which this token comes first, and another sequence's second.
        rows = torch.tensor([row, 0])
        two = _of_rows(scan, rows)
        states = torch.stack([state, torch.randn(scan.state_shape)])
        output, states = two.decode(2, states)
        state = states[0]
        torch.testing.assert_close(output[0], expected[row], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=1e-4, atol=1e-5)


def _of_rows(scan: Scan, rows: torch.Tensor) -> Scan:
    from dataclasses import fields, replace

    taken = {id(each) for each in scan.rows}
    changes = {
        field.name: getattr(scan, field.name)[rows]
        for field in fields(scan)  # type: ignore[arg-type]
        if id(getattr(scan, field.name)) in taken
    }
    return replace(scan, **changes)  # type: ignore[type-var]


@SCANS
def test_the_first_tokens_still_matter_after_the_grid(make: Callable[[int], Scan]) -> None:
    torch.manual_seed(1)
    scan = make(150)
    state = torch.randn(scan.state_shape)
    ends = [GRID, 2 * GRID, 150]
    output, _ = in_chunks(scan, ends, state)
    other, _ = in_chunks(scan, ends, torch.zeros(scan.state_shape))
    assert (output[2 * GRID :] - other[2 * GRID :]).abs().max() > 1e-3


@SCANS
def test_where_a_text_is_cut_on_the_grid_changes_no_bit(make: Callable[[int], Scan]) -> None:
    torch.manual_seed(2)
    scan = make(150)
    state = torch.randn(scan.state_shape)
    whole, after = in_chunks(scan, [GRID, 2 * GRID, 150], state)
    first, middle = in_chunks(scan, [GRID], state)
    kept = middle.clone(memory_format=torch.contiguous_format)
    rest = [scan.chunk(start, end, kept) for start, end in [(GRID, 2 * GRID)]]
    last, end_state = scan.chunk(2 * GRID, 150, rest[0][1])
    assert torch.equal(torch.cat([first, rest[0][0], last]), whole)
    assert torch.equal(end_state, after)
    assert torch.equal(kept, middle)  # what is read is not written
