"""A linear layer of a weight in few bits: products that widen in registers, or one widened copy.

The planes of a weight (`weight_format`) lie in one run of bytes, as those of an expert do, and are
read by `narrow_product`.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

from hotset.kernels.eight_bit import eight_bit_product
from hotset.kernels.narrow_codes import load_scales, load_zeros, widen
from hotset.kernels.narrow_launch import as_inputs, narrow_tiles_for, opens_in_pairs, planes_of
from hotset.kernels.narrow_product import narrow_product
from hotset.weight_format import Plane, WeightFormat

_WIDEN_ROWS, _WIDEN_BYTES = 32, 64  # of codes, which a program widens


class Matrix(Protocol):
    """See `linear.narrow_matrix.NarrowMatrix`."""

    @property
    def form(self) -> WeightFormat: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def codes(self) -> Plane: ...  # noqa: D102
    @property
    def scales(self) -> Plane: ...  # noqa: D102
    @property
    def more(self) -> Plane | None: ...  # noqa: D102


@triton.jit  # type: ignore[untyped-decorator]
def _linear(  # type: ignore[no-untyped-def]
    x,
    payload,
    x_scales,
    out,
    num_rows,
    PLANES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    NUM_SCALES: tl.constexpr,
):
    place = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = place < num_rows
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = tl.minimum(column, N - 1)
    source = tl.where(inside, place, 0).to(tl.int64)
    x_at = x + source[None, :] * X_WIDTH
    address, scale_row = payload.to(tl.int64), real // PLANES[6]
    if NUM_SCALES:
        scales_at = x_scales + source * NUM_SCALES
        sums = eight_bit_product(
            address, real, scale_row, x_at, scales_at, PLANES, K, BLOCK_ROWS, COLUMNS, DEPTH
        )
    else:
        sums = narrow_product(
            address, real, scale_row, x_at, PLANES, K, BLOCK_ROWS, COLUMNS, DEPTH, IN_PAIRS
        )
    out_at = out + place.to(tl.int64)[None, :] * N + column[:, None]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=inside[None, :] & (column < N)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _widen_matrix(  # type: ignore[no-untyped-def]
    payload,
    out,
    PLANES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    address = payload.to(tl.int64)
    PER_BYTE: tl.constexpr = 1 if PLANES[0] == 0 or PLANES[0] == 3 else 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None, None]  # as `widen` has it
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[None, None, None, :]
    mask = (row < N) & (byte < K // PER_BYTE)
    codes_at = address.to(tl.pointer_type(tl.uint8)) + PLANES[1]
    codes = tl.load(codes_at + row.to(tl.int64) * (K // PER_BYTE) + byte, mask=mask, other=0)
    num_groups: tl.constexpr = (K + PLANES[4] - 1) // PLANES[4]
    group = row // PLANES[6] * num_groups + byte * PER_BYTE // PLANES[4]
    scale = load_scales(address, group, mask, PLANES)
    zero = load_zeros(address, group, mask, PLANES)
    if PLANES[5] == 4:  # scales of rows, and what `widen` leaves out of the others
        weight = widen(address, codes, scale, zero, PLANES, tl.float32, False)
        rows_at = (address + PLANES[3]).to(tl.pointer_type(tl.float32))
        weight *= tl.load(rows_at + row, mask=row < N, other=0.0)[:, :, :, :, None] * 256.0
        weight = weight.to(out.dtype.element_ty)
    else:
        weight = widen(address, codes, scale, zero, PLANES, out.dtype.element_ty, False)
    if PER_BYTE == 1:
        tl.store(out + row.to(tl.int64) * K + byte, weight, mask=mask)
    else:
        weight = tl.reshape(weight, [ROWS, 2 * BYTES])
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * BYTES * 2 + tl.arange(0, 2 * BYTES)[None, :]
        tl.store(out + row.to(tl.int64) * K + column, weight, mask=(row < N) & (column < K))


def narrow_linear(x: torch.Tensor, payload: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """`x @ weight.T`, the weight widened in registers, or both in 8 bits.

    Args:
        x: `[T, K]` bfloat16 or float16, contiguous.
        payload: uint8, the planes of the weight; a multiple of 128 is where it begins.
        matrix: `[N, K]`, in a format that `narrow_forms.can_read`.

    Returns:
        `[T, N]`, dtype of `x`. Sums are in float32; see `narrow_product` for what is rounded.

    Cost: the payload is read once for each tile of rows.
    Reference: `linear.narrow_matrix.NarrowMatrix.widened`, bit-exact in the weights.
    """
    num_rows, (num_outputs, num_columns) = len(x), matrix.shape
    out = x.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out
    tiles = narrow_tiles_for(num_rows, 1, matrix.form, x.device)
    tile = tiles.up
    source = as_inputs(x, matrix.form)
    grid = (triton.cdiv(num_outputs, tile.columns), triton.cdiv(num_rows, tiles.block_rows))
    _linear[grid](
        source.values, payload, out if source.scales is None else source.scales, out, num_rows,
        PLANES=planes_of(matrix.form, matrix), N=num_outputs, K=num_columns,
        X_WIDTH=source.values.shape[1], BLOCK_ROWS=tiles.block_rows, COLUMNS=tile.columns,
        DEPTH=tile.depth, IN_PAIRS=opens_in_pairs(matrix.form, x),
        NUM_SCALES=source.num_scales, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def widen_matrix(payload: torch.Tensor, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """`[N, K]` of `dtype`; see `narrow_linear` for the arguments and the reference."""
    num_rows, num_columns = matrix.shape
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=payload.device)
    num_bytes = num_columns * matrix.form.code_bits // 8
    grid = (triton.cdiv(num_rows, _WIDEN_ROWS), triton.cdiv(num_bytes, _WIDEN_BYTES))
    _widen_matrix[grid](
        payload, out, PLANES=planes_of(matrix.form, matrix), N=num_rows, K=num_columns,
        ROWS=_WIDEN_ROWS, BYTES=_WIDEN_BYTES,
    )  # fmt: skip
    return out
