"""Figures of a device: those that must agree with each other, whatever they are."""

import pytest

from hotset.cost.tuning import TUNINGS


@pytest.mark.parametrize("device", TUNINGS)
def test_recorded_sizes_ascend_and_the_largest_holds_a_mixed_step(device: str) -> None:
    tuning = TUNINGS[device]
    for sizes in (tuning.decode_sizes, tuning.mixed_sizes):
        assert list(sizes) == sorted(set(sizes))
    assert tuning.mixed_sizes[-1] >= tuning.mixed_tokens
    assert tuning.mixed_tokens % tuning.row_tile == 0


@pytest.mark.parametrize("shared_bytes", [48 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
def test_tiles_fit_into_the_memory_of_the_gpu(shared_bytes: int) -> None:
    heights = []
    for num_rows in (8, 64, 128, 1024, 2048, 4096, 65536):
        tiles = TUNINGS["cuda"].tiles(num_rows, 128, shared_bytes=shared_bytes)
        for tile in (tiles.up, tiles.down):
            piece_bytes = 2 * tile.depth * (tiles.block_rows + tile.columns)
            assert piece_bytes * tile.num_stages <= shared_bytes
            assert tile.num_stages >= 2 and tile.depth >= 16
        heights.append(tiles.block_rows)
    assert heights == sorted(heights)
    assert set(heights) == {16, 32, 64, 128}
