"""Slots of hot requests chosen by a kernel, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.kernels import hot_reference  # noqa: E402
from hotset.kernels.hot_reference import LayerSeats, Total  # noqa: E402
from hotset.kernels.resolve_rows import resolve_rows  # noqa: E402

BLOCK_SIZE, ROWS_PER_BLOCK = 4, 12  # of three layers


def tables(num_seats: int, num_slots: int, num_tokens: int) -> LayerSeats:
    """Seats whose slots hold no token yet, and whose tokens are all in host memory."""
    num_blocks = num_tokens // BLOCK_SIZE
    host = torch.randperm(2 * num_seats * num_blocks)[: num_seats * num_blocks]
    blocks = torch.randperm(num_seats * num_slots)[: num_seats * num_slots // BLOCK_SIZE]
    order = torch.stack([torch.randperm(num_slots) for _ in range(num_seats)])
    return LayerSeats(
        host.view(num_seats, -1).int(),
        blocks.view(num_seats, -1).int(),
        torch.full((num_seats, num_slots), -1, dtype=torch.int32),
        order.to(torch.int16),
        torch.full((num_seats, num_tokens), -1, dtype=torch.int16),
        torch.zeros(num_seats, num_slots, dtype=torch.int16),
        torch.zeros(num_seats, 2, dtype=torch.int32),
        torch.zeros(num_seats, len(Total), dtype=torch.int64),
    )


def select(num_tokens: int, num_selected: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A selection of `length` tokens or all, and the rows of those that are resident."""
    weights = torch.rand(num_tokens)
    weights[: num_tokens // 3] += 1  # wanted again and again
    count = min(length, num_selected)
    positions = torch.full((num_selected,), -1, dtype=torch.int32)
    positions[:count] = weights[:length].topk(count).indices.int()
    is_resident = (positions >= length - 3) | (positions < 0)
    rows = torch.where(is_resident, 10_000 + positions, -1)
    return positions, torch.where(positions < 0, -1, rows).int()


@pytest.mark.parametrize(
    ("num_selected", "num_slots", "num_tokens", "rows_per_token"),
    [(1, 4, 8, 1), (8, 8, 64, 3), (7, 12, 40, 2), (20, 1100, 1200, 3), (1030, 1032, 1600, 1)],
)
def test_a_layer_leaves_what_the_reference_leaves(
    num_selected: int, num_slots: int, num_tokens: int, rows_per_token: int
) -> None:
    torch.manual_seed(num_slots)
    expected = tables(5, num_slots, num_tokens)
    got = LayerSeats(*(table.to(DEVICE, copy=True) for table in expected))
    lengths = (1, num_selected, num_tokens // 2, *[num_tokens] * 5)
    for length, is_guess in zip(lengths, [*[False] * 4, True, False, True, False], strict=True):
        seats = torch.tensor([3, -1, 0, 4])
        chosen = [select(num_tokens, num_selected, length) for _ in seats]
        selection = torch.stack([positions for positions, _ in chosen])
        rows = torch.stack([found for _, found in chosen])
        rows_on_device = rows.to(DEVICE, copy=True)
        sizes = {
            "block_size": BLOCK_SIZE,
            "rows_per_block": ROWS_PER_BLOCK,
            "rows_per_token": rows_per_token,
            "is_guess": is_guess,
        }

        wanted = hot_reference.resolve(selection, rows, seats, expected, **sizes)
        misses = resolve_rows(selection.to(DEVICE), rows_on_device, seats.to(DEVICE), got, **sizes)

        assert torch.equal(rows_on_device.cpu(), rows)
        assert torch.equal(misses.counts.cpu(), wanted.counts)
        for token, count in enumerate(wanted.counts.tolist()):
            assert torch.equal(misses.places[token, :count].cpu(), wanted.places[token, :count])
            assert torch.equal(misses.rows[token, :count].cpu(), wanted.rows[token, :count])
        for name in ("token_in", "order", "ahead", "totals"):
            assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), name
        assert (got.rank_of == -1).all()
    assert expected.totals[0, 0] > 0 and expected.totals[0, 1] > 0 and not expected.totals[1].any()
    if num_selected in (7, 1030):  # guesses and selections of the others rarely differ or agree
        totals = expected.totals.sum(0)
        assert 0 < totals[Total.GUESSED_RIGHT] < totals[Total.GUESSED]


def test_a_token_without_a_copy_in_host_memory_is_counted() -> None:
    layer = LayerSeats(*(table.to(DEVICE) for table in tables(1, 4, 8)))
    layer.host[0, 1] = -1
    selection = torch.tensor([[2, 5]], dtype=torch.int32, device=DEVICE)
    rows = torch.full_like(selection, -1)

    resolve_rows(
        selection,
        rows,
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        layer,
        block_size=BLOCK_SIZE,
        rows_per_block=ROWS_PER_BLOCK,
        rows_per_token=1,
    )

    assert layer.totals.tolist() == [[0, 2, 1, 0, 0]]
