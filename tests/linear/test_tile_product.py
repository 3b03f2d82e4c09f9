"""Products with narrow weights: those of the widened weights, whatever rows share a product."""

import threading

import pytest
import torch
from torch import nn

from hotset.checkpoint.gguf_blocks import FORMS
from hotset.linear import tile_product
from hotset.linear.merged import MergedLinear, merge_linears
from hotset.linear.narrow import NarrowEmbedding, NarrowLinear, narrow_tiles
from hotset.linear.tiles import TileFormat, Tiles, make_tiles

pytest.importorskip("llvmlite", reason="the extra `cpu` is not installed")


def make_weight(form: TileFormat, num_rows: int, num_columns: int = 512, seed: int = 0) -> Tiles:
    """Any codes; scales and factors of either sign."""
    generator = torch.Generator().manual_seed(seed)
    low, high, dtype = (0, 16, torch.uint8) if form.code_bits == 4 else (-128, 128, torch.int8)
    codes = torch.randint(low, high, (num_rows, num_columns), dtype=dtype, generator=generator)
    spans, groups = num_columns // form.span, num_columns // form.group
    scales = torch.randn(num_rows, spans, form.num_parts, generator=generator).half()
    shape = (num_rows, groups, form.num_parts)
    factors = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return make_tiles(form, codes, scales, factors if form.has_factors else None)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_has_the_same_product_in_any_step(name: str, num_threads: int) -> None:
    tiles = make_weight(FORMS[name], 150)  # three tiles, two more, and the last one is not full
    x = torch.randn(37, 512)
    wide = tiles.rows(torch.arange(150))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        out = tile_product.multiply(x, tiles)
        for num_rows in (1, 2, 3, 8, 9, 20):
            assert torch.equal(tile_product.multiply(x[-num_rows:].clone(), tiles), out[-num_rows:])
    finally:
        torch.set_num_threads(before)
    expected = x.double() @ wide.double().t()
    assert (out - expected).abs().max() < 2e-6 * expected.abs().max()


def test_columns_beyond_a_block_are_added_in_order() -> None:
    """Sums go over columns one after another: this order of float32 sums is the reference."""
    tiles = make_weight(FORMS["Q8_0"], 32, 288)  # a block of 256 columns and one group
    x, wide = torch.randn(12, 288), tiles.rows(torch.arange(32))
    sums = torch.zeros(12, 32, dtype=torch.float64)
    for column in range(288):  # a fused multiply-add rounds once
        products = x[:, column, None].double() * wide[None, :, column].double()
        sums = (sums + products).float().double()
    assert torch.equal(tile_product.multiply(x, tiles).double(), sums)


def test_each_form_passes_its_check_and_a_wrong_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tile_product.check(FORMS["Q4_1"]) is None
    right = tile_product.multiply

    def wrong(x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        return right(x, tiles) * (1 + 1e-5)

    monkeypatch.setattr(tile_product, "multiply", wrong)
    assert "wrong by" in str(tile_product.check(FORMS["Q4_1"]))
    monkeypatch.setattr(tile_product, "multiply", lambda x, tiles: right(x, tiles) + len(x))
    assert "depend on the number of rows" in str(tile_product.check(FORMS["Q4_1"]))


def test_layers_have_biases_dtypes_and_any_leading_dimensions() -> None:
    tiles, bias = make_weight(FORMS["Q4_K"], 64), torch.randn(64)
    layer = NarrowLinear(tiles, bias)
    x = torch.randn(2, 3, 512)
    expected = nn.functional.linear(x, layer.weight, bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-2)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 3, 64)
    table = NarrowEmbedding(tiles, torch.bfloat16)
    ids = torch.tensor([[63, 0], [5, 5]])
    assert torch.equal(table(ids), layer.weight[ids].bfloat16())


def test_siblings_of_one_form_are_merged_and_share_no_weight_twice() -> None:
    holder = nn.Module()
    holder.q_proj = NarrowLinear(make_weight(FORMS["Q4_1"], 64), None)
    holder.k_proj = NarrowLinear(make_weight(FORMS["Q4_1"], 32, seed=1), None)
    holder.v_proj = NarrowLinear(make_weight(FORMS["Q4_1"], 32, seed=2), None)
    holder.gate_proj = NarrowLinear(make_weight(FORMS["Q4_1"], 48), None)  # ends within a tile
    holder.up_proj = NarrowLinear(make_weight(FORMS["Q4_1"], 48), None)
    x = torch.randn(5, 512)
    layers = dict(holder.named_children())
    expected = {name: layer(x) for name, layer in layers.items()}
    num_bytes = sum(tiles.num_bytes for tiles in narrow_tiles(holder))

    merge_linears(holder)

    merged = {name for name, layer in holder.named_children() if isinstance(layer, MergedLinear)}
    assert merged == {"q_proj", "k_proj", "v_proj"}
    assert sum(tiles.num_bytes for tiles in narrow_tiles(holder)) == num_bytes
    for name, layer in holder.named_children():
        assert torch.equal(layer(x), expected[name]), name


def test_threads_may_multiply_at_the_same_time() -> None:
    tiles, x = make_weight(FORMS["Q4_1"], 256), torch.randn(4, 512)
    expected, found = tile_product.multiply(x, tiles), []

    def multiply() -> None:
        found.extend(tile_product.multiply(x, tiles) for _ in range(50))

    threads = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 150 and all(torch.equal(each, expected) for each in found)
