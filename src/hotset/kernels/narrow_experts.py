"""Experts in few bits, computed as they lie: kernels widen codes in registers.

As `fused_experts`, but an expert is one address, where its payload begins, and the planes of both
matrices lie at fixed distances from it (`weight_format`). Two neighbours share a byte of 4-bit
codes, so inputs are laid out with the even columns first and the odd ones behind them: a tile of
bytes feeds two products, and no weight moves. Widened weights are the left operand, which tensor
cores of Hopper take from registers.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from hotset.cost.tuning import Tile
from hotset.kernels.expert_routing import route_rows
from hotset.kernels.fused_experts import _load_block, sum_rows, tiles_for
from hotset.kernels.narrow_forms import CODES, Gate
from hotset.weight_format import WeightFormat

_SCALES = {"float32": 0, "bfloat16": 1, "float16": 2, "e8m0": 3}
_MOST_COLUMNS = 128


class Layout(Protocol):
    """See `experts.narrow.NarrowLayout`, and `NarrowMatrix` there."""

    form: WeightFormat
    matrices: tuple[Any, ...]


@triton.jit  # type: ignore[untyped-decorator]
def _factors(  # type: ignore[no-untyped-def]
    payload, AT: tl.constexpr, index, mask, SCALE: tl.constexpr, CODE: tl.constexpr
):
    """Scales in float32, with the power of 2 by which codes are opened too small."""
    at = payload + AT
    if SCALE == 0:
        scale = tl.load(at.to(tl.pointer_type(tl.float32)) + index, mask=mask, other=0.0)
    elif SCALE == 1:
        scale = tl.load(at.to(tl.pointer_type(tl.bfloat16)) + index, mask=mask, other=0.0)
    elif SCALE == 2:
        scale = tl.load(at.to(tl.pointer_type(tl.float16)) + index, mask=mask, other=0.0)
    else:  # an exponent; that of 2**-127 has bits of its own
        exponent = tl.load(at.to(tl.pointer_type(tl.uint8)) + index, mask=mask, other=0)
        bits = exponent.to(tl.int32) << 23
        scale = tl.where(bits == 0, 0x400000, bits).to(tl.float32, bitcast=True)
    factor = scale.to(tl.float32)
    if CODE == 0:
        return factor * 256.0
    if CODE == 1:
        return factor * 16384.0
    return factor


@triton.jit  # type: ignore[untyped-decorator]
def _open(codes, zeros, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as float32, by their bits: as a half float with the same exponent and mantissa."""
    bits = codes.to(tl.uint16)
    if CODE == 0:
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32)
    if CODE == 1:
        half = ((bits & 8) << 12) | ((bits & 7) << 9)
        return half.to(tl.float16, bitcast=True).to(tl.float32)
    return bits.to(tl.float32) - zeros


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    sums,
    payload,
    row,
    scale_row,
    x_at,
    start,
    PLANES: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the product of `DEPTH` columns from `start` on to `[COLUMNS, rows]` sums."""
    CODE: tl.constexpr = PLANES[0]
    GROUP: tl.constexpr = PLANES[4]
    PER_BYTE: tl.constexpr = 1 if CODE == 0 else 2
    WIDTH: tl.constexpr = GROUP if GROUP < DEPTH else DEPTH  # columns with one scale
    GROUPS: tl.constexpr = DEPTH // WIDTH
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    g = tl.arange(0, GROUPS)[None, :, None]
    j = tl.arange(0, WIDTH // PER_BYTE)[None, None, :]
    at = start // PER_BYTE + g * (WIDTH // PER_BYTE) + j  # [1, GROUPS, bytes]
    # Without this hint, which has to be on the pointer, codes are loaded byte by byte.
    codes_at = tl.multiple_of(payload.to(tl.pointer_type(tl.uint8)), 16) + PLANES[1]
    codes_at += row[:, None, None] * (K // PER_BYTE) + at
    IS_WHOLE: tl.constexpr = K % DEPTH == 0
    codes = tl.load(codes_at, mask=IS_WHOLE | (at < K // PER_BYTE), other=0)
    group = start // GROUP + g
    index = scale_row[:, None, None] * NUM_GROUPS + group
    has_group = (group < NUM_GROUPS) & (row[:, None, None] >= 0)
    factor = _factors(payload, PLANES[2], index, has_group, PLANES[5], CODE)
    zeros = 8.0
    if PLANES[3] >= 0:
        zeros_at = (payload + PLANES[3]).to(tl.pointer_type(tl.uint8))
        zeros = tl.load(zeros_at + index, mask=has_group, other=0).to(tl.float32)
    dtype: tl.constexpr = x_at.dtype.element_ty
    i = tl.arange(0, DEPTH // PER_BYTE)[:, None]
    is_column = IS_WHOLE | (start // PER_BYTE + i < K // PER_BYTE)
    x_at += start // PER_BYTE + i
    x = tl.load(x_at, mask=is_column, other=0.0)
    if PER_BYTE == 1:
        weight = (_open(codes, zeros, CODE) * factor).to(dtype)
        sums = tl.dot(tl.reshape(weight, [COLUMNS, DEPTH]), x, sums)
    else:
        low = (_open(codes & 15, zeros, CODE) * factor).to(dtype)
        sums = tl.dot(tl.reshape(low, [COLUMNS, DEPTH // 2]), x, sums)
        x = tl.load(x_at + K // 2, mask=is_column, other=0.0)
        high = (_open(codes >> 4, zeros, CODE) * factor).to(dtype)
        sums = tl.dot(tl.reshape(high, [COLUMNS, DEPTH // 2]), x, sums)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _gated_up(  # type: ignore[no-untyped-def]
    hidden,
    addresses,
    rows,
    blocks,
    num_blocks,
    biases,
    out,
    PLANES: tl.constexpr,
    HIDDEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    num_tiles: tl.constexpr = (MIDDLE + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // num_tiles
    expert, first, end = _load_block(blocks + 3 * block)
    if block >= tl.load(num_blocks):
        return
    payload = tl.load(addresses + expert)
    if payload == 0:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    inside = place < end
    token = tl.load(rows + place, mask=inside, other=0) // TOP_K
    column = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    real = tl.minimum(column, MIDDLE - 1)  # beyond the last: computed as the last, not stored
    if ALPHA != 0:  # gate and up are neighbours
        gate_row, up_row = 2 * real, 2 * real + 1
        gate_scale, up_scale = gate_row // PLANES[6], up_row // PLANES[6]
    else:
        gate_row, up_row = real, real + MIDDLE
        gate_scale, up_scale = real // PLANES[6], real // PLANES[6] + SCALE_ROWS
    x_at = hidden + token.to(tl.int64)[None, :] * HIDDEN
    gate = tl.zeros([COLUMNS, BLOCK_ROWS], tl.float32)
    up = tl.zeros([COLUMNS, BLOCK_ROWS], tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        gate = _multiply(
            gate, payload, gate_row, gate_scale, x_at, start, PLANES, HIDDEN, DEPTH, COLUMNS
        )
        up = _multiply(up, payload, up_row, up_scale, x_at, start, PLANES, HIDDEN, DEPTH, COLUMNS)
    if HAS_BIAS:
        bias_at = biases + expert * (2 * MIDDLE)
        gate += tl.load(bias_at + gate_row).to(tl.float32)[:, None]
        up += tl.load(bias_at + up_row).to(tl.float32)[:, None]
    if ALPHA != 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        middle = gate * tl.sigmoid(gate * ALPHA) * up
    else:
        middle = gate * tl.sigmoid(gate) * up
    column_at = real
    if PLANES[0] != 0:  # even columns first, as the next product reads them
        column_at = (real % 2) * (MIDDLE // 2) + real // 2
    out_at = out + place.to(tl.int64)[None, :] * MIDDLE + column_at[:, None]
    is_real = inside[None, :] & (column < MIDDLE)[:, None]
    tl.store(out_at, middle.to(out.dtype.element_ty), mask=is_real)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_down(  # type: ignore[no-untyped-def]
    middle,
    addresses,
    rows,
    blocks,
    num_blocks,
    biases,
    row_weights,
    out,
    PLANES: tl.constexpr,
    HIDDEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    num_tiles: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // num_tiles
    expert, first, end = _load_block(blocks + 3 * block)
    if block >= tl.load(num_blocks):
        return
    payload = tl.load(addresses + expert)
    if payload == 0:
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    inside = place < end
    row = tl.load(rows + place, mask=inside, other=0)
    column = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    real = tl.minimum(column, HIDDEN - 1)
    # Places beyond the block's are other blocks' or none's: computed as the first, not stored.
    source = tl.where(inside, place, first)
    x_at = middle + source.to(tl.int64)[None, :] * MIDDLE
    sums = tl.zeros([COLUMNS, BLOCK_ROWS], tl.float32)
    for start in range(0, MIDDLE, DEPTH):
        sums = _multiply(
            sums, payload, real, real // PLANES[6], x_at, start, PLANES, MIDDLE, DEPTH, COLUMNS
        )
    if HAS_BIAS:
        sums += tl.load(biases + expert * HIDDEN + real).to(tl.float32)[:, None]
    sums *= tl.load(row_weights + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_at = out + row.to(tl.int64)[None, :] * HIDDEN + column[:, None]
    is_real = inside[None, :] & (column < HIDDEN)[:, None]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=is_real)


def narrow_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    addresses: torch.Tensor,
    layout: Layout,
    gate: Gate,
    *,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    before_pass: Callable[[int], None] = lambda number: None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, which are in few bits wherever they are.

    T = tokens, K = experts of a token, E = experts, H = hidden size, I = middle size.

    Args:
        hidden: `[T, H]` bfloat16 or float16, contiguous.
        ids: `[T, K]` integer, contiguous, not negative; those of E and more add nothing.
        weights: `[T, K]` floats, contiguous.
        addresses: `[E]`, or `[P, E]` for P passes, int64 on the device: where the payload of each
            expert begins, a multiple of 128; 0 for those of no row in the pass.
        layout: of a payload: `[2 * I, H]` or `[2, I, H]`, then `[H, I]`, in a format that
            `narrow_forms.can_read`.
        gate: what is between the products.
        biases: `[E, 2 * I]` and `[E, H]` of both products, contiguous; None where there are none.
        before_pass: called before each pass is submitted, with its number.

    Returns:
        `[T, H]`, dtype of `hidden`. A weight is widened to it as `NarrowLayout.dequantise` does;
        the middle and each weighted row are rounded to it; all else is in float32. A token's values
        depend on its own row, ids and weights and on the tiles, which T * K and E choose.

    Cost: the payloads of experts that got rows are read once. Launches of fixed shape; nothing is
    asked of the host.
    Reference: `tests/kernels/test_narrow_kernels.py`.
    """
    num_tokens, top_k = ids.shape
    by_pass = addresses.view(-1, addresses.shape[-1])
    num_experts, hidden_size = by_pass.shape[1], hidden.shape[1]
    up, down = layout.matrices
    middle_size = down.shape[-1]
    tiles = tiles_for(ids.numel(), num_experts, hidden.device)
    routing = route_rows(ids.view(-1), num_experts, tiles.block_rows)
    source = hidden
    if layout.form.code_bits == 4:
        source = hidden.view(num_tokens, hidden_size // 2, 2).transpose(1, 2).contiguous()
    middle = hidden.new_empty(num_tokens * top_k, middle_size)
    rows = hidden.new_empty(num_tokens * top_k, hidden_size)
    out = torch.empty_like(hidden)
    if not len(routing.blocks):
        return out
    of_up, of_down = (hidden, hidden) if biases is None else biases
    columns = min(tiles.up.columns // 2, _MOST_COLUMNS)
    shared = {"HAS_BIAS": biases is not None, "BLOCK_ROWS": tiles.block_rows}
    for number, payloads in enumerate(by_pass):
        before_pass(number)
        _gated_up[(len(routing.blocks) * triton.cdiv(middle_size, columns),)](
            source, payloads, routing.rows, routing.blocks, routing.num_blocks, of_up, middle,
            PLANES=_planes(layout.form, up), HIDDEN=hidden_size, MIDDLE=middle_size, TOP_K=top_k,
            COLUMNS=columns, DEPTH=_depth(tiles.up, hidden_size),
            SCALE_ROWS=_scale_rows(up, middle_size), ALPHA=gate.alpha, LIMIT=gate.limit,
            num_warps=tiles.up.num_warps, num_stages=tiles.up.num_stages, **shared,
        )  # fmt: skip
        columns_down = min(tiles.down.columns, _MOST_COLUMNS)
        _weighted_down[(len(routing.blocks) * triton.cdiv(hidden_size, columns_down),)](
            middle, payloads, routing.rows, routing.blocks, routing.num_blocks, of_down, weights,
            rows, PLANES=_planes(layout.form, down), HIDDEN=hidden_size, MIDDLE=middle_size,
            COLUMNS=columns_down, DEPTH=_depth(tiles.down, middle_size),
            num_warps=tiles.down.num_warps, num_stages=tiles.down.num_stages, **shared,
        )  # fmt: skip
    sum_rows(rows, ids, out, num_experts=num_experts)
    return out


def _planes(form: WeightFormat, matrix: Any) -> tuple[Any, ...]:
    """Code; where codes, scales and zeros begin; columns of a group, kind of scales, rows."""
    zeros = -1 if matrix.zeros is None else matrix.zeros.offset
    group = form.columns or triton.next_power_of_2(matrix.shape[-1])
    rows = form.rows or matrix.shape[-2]
    scale = _SCALES[str(form.scale)]
    return CODES[form.code], matrix.codes.offset, matrix.scales.offset, zeros, group, scale, rows


def _scale_rows(up: Any, middle_size: int) -> int:
    """Rows of scales before those of what the gate multiplies."""
    return int(up.scales.shape[-2]) if len(up.shape) == 3 else middle_size


def _depth(tile: Tile, columns: int) -> int:
    """Columns of a tile: all are full, where that leaves as many as an instruction takes."""
    depth = tile.depth
    while columns % depth and depth > 64:
        depth //= 2
    return depth
