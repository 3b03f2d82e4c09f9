"""Products of float32 rows with narrow weights in tiles, on a CPU."""

import ctypes
import functools

import torch

from hotset.linear import native
from hotset.linear.tiles import TILE_ROWS, TileFormat, Tiles

_CHECK_COLUMNS = 512
_CHECK_BOUND = 2e-6  # of the largest output; float32 sums of 512 columns differ by 3e-7
# What is computed at once with 32 registers of 512 bits, and with others.
_AT_ONCE_WIDE = {"fused_rows": 8, "summed_rows": 8, "tiles_at_once": 3}
_AT_ONCE = {"fused_rows": 1, "summed_rows": 2, "tiles_at_once": 1}


def multiply(x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """`x @ weight.T`: the same bits for a row, whatever rows it comes with.

    Args:
        x: `[M, K]` float32, contiguous, on the CPU.
        tiles: the weight, `[N, K]`.

    Returns:
        `[M, N]` float32.
    """
    out = x.new_empty(len(x), tiles.codes.shape[0] * TILE_ROWS)
    given = arguments(tiles, len(x), x.data_ptr(), out.data_ptr())
    native.run(compiled(tiles.form), (ctypes.c_int64 * len(given))(*given))
    return out if out.shape[1] == tiles.num_rows else out[:, : tiles.num_rows]


def arguments(tiles: Tiles, num_rows: int, x: int, out: int) -> list[int]:
    """What the product of a weight is called with, as `tile_code.ARGUMENTS`; `x`, `out`: addresses.

    `out` has a row of whole tiles for each row of `x`.
    """
    factors = tiles.scales if tiles.factors is None else tiles.factors
    planes = [plane.data_ptr() for plane in (tiles.codes, tiles.scales, factors)]
    return [num_rows, 0, x, *planes, out, tiles.num_columns, tiles.codes.shape[0]]


def check(form: TileFormat) -> str | None:
    """Compare products of random weights with float64 ones; what is wrong, or None.

    Takes 0.5 s, most of it to compile. Whatever LLVM raises is what is wrong, too.
    """
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=generator)

    num_tiles, num_parts = 5, form.num_parts  # three at once, and two
    code_shape = (num_tiles, _CHECK_COLUMNS // form.columns_together, TILE_ROWS)
    if form.code_bits == 4:
        codes = integers(-(2**31), 2**31, code_shape, torch.int32)
    else:
        codes = integers(-128, 128, code_shape, torch.int8)
    scale_shape = (num_tiles, _CHECK_COLUMNS // form.span, num_parts, TILE_ROWS)
    factor_shape = (num_tiles, _CHECK_COLUMNS // form.group, num_parts, TILE_ROWS)
    tiles = Tiles(
        form,
        num_tiles * TILE_ROWS - 5,
        codes,
        torch.randn(scale_shape, generator=generator).half(),
        integers(-128, 128, factor_shape, torch.int8) if form.has_factors else None,
    )
    x = torch.randn(21, _CHECK_COLUMNS, generator=generator)
    expected = x.double() @ tiles.rows(torch.arange(tiles.num_rows)).double().t()
    try:
        products = [multiply(x[:num_rows], tiles) for num_rows in (1, 3, 21)]
    except Exception as error:  # whatever LLVM raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    found = products[-1]
    if any(not torch.equal(part, found[: len(part)]) for part in products):
        return "products depend on the number of rows"
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    return None if worst < _CHECK_BOUND else f"products are wrong by {worst:.1e}"


@functools.cache
def compiled(form: TileFormat) -> int:
    """The address of the product for weights of a form."""
    from hotset.linear.tile_code import make_module  # needs the extra

    at_once = _AT_ONCE_WIDE if native.has_wide_registers() else _AT_ONCE
    module = make_module(form, **at_once)
    return native.compile_function(module, "product")
