"""Rows gathered from host memory, in Triton's interpreter where there is no GPU."""

import os
from dataclasses import replace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

from hotset.cost.tuning import TUNINGS  # noqa: E402
from hotset.kernels import hot_reference  # noqa: E402
from hotset.kernels.gather_rows import gather_rows  # noqa: E402
from hotset.kernels.hot_reference import RowRun  # noqa: E402


@pytest.mark.parametrize("num_programs", [1, 3, 7, 64])
@pytest.mark.parametrize(
    ("row_bytes", "block_size", "side", "first", "num_layers"),
    [(8, 4, 1, 0, 1), (656, 8, 2, 0, 2), (656, 8, 2, 1, 1), (1152, 3, 2, 0, 1)],
)
def test_the_listed_rows_are_copied_and_nothing_else_changes(
    row_bytes: int, block_size: int, side: int, first: int, num_layers: int, num_programs: int
) -> None:
    torch.manual_seed(0)
    # Of four layers, whose rows are numbered as one on the device: the third, or of the last two,
    # which lie side by side, either or both.
    start = (2 * block_size + first) * row_bytes
    run = RowRun(start, row_bytes, num_layers, block_size, 4 * block_size, side)
    block_bytes = 4 * block_size * row_bytes
    source = torch.randint(0, 256, (6, block_bytes + 4096), dtype=torch.uint8)
    if DEVICE == "cuda":
        source = source.pin_memory()
    target = torch.randint(0, 256, (9, block_bytes), dtype=torch.uint8, device=DEVICE)
    expected, also = target.clone(), target.clone()
    counts = [0, 1, 5, 6]  # of seats that may list 6
    places = torch.randint(0, 6 * block_size, (4, 6), dtype=torch.int32)
    rows = torch.randperm(9 * block_size)[:24].view(4, 6).to(torch.int32)
    rows = rows // block_size * run.rows_per_block + rows % block_size * side
    for seat, count in enumerate(counts):
        for place, row in zip(places[seat, :count], rows[seat, :count], strict=True):
            slot, origin = divmod(int(place), block_size)
            block, goal = divmod(int(row), run.rows_per_block)
            wanted = source[slot, start + origin * side * row_bytes :][: num_layers * row_bytes]
            expected[block, start + goal * row_bytes :][: num_layers * row_bytes] = wanted

    lists = [one.to(DEVICE) for one in (places, rows, torch.tensor(counts, dtype=torch.int32))]
    tuning = replace(TUNINGS["cuda"], gather_programs=num_programs, gather_rows=2)
    gather_rows(source, target, *lists, run, tuning=tuning)
    hot_reference.gather(source, also, *lists, run)

    assert torch.equal(target, expected) and torch.equal(also, expected)
