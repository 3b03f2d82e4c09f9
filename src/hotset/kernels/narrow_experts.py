"""Experts in few bits, computed as they lie.

As `fused_experts`, but an expert is one address, where its payload begins, and the planes of both
matrices lie at fixed distances from it (`weight_format`). `narrow_product` widens codes in
registers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch.nn import functional

from hotset.cost.tuning import TUNINGS, Tile, Tiles
from hotset.kernels.expert_routing import route_rows
from hotset.kernels.fused_experts import _load_block, shared_bytes, sum_rows
from hotset.kernels.narrow_forms import CODES, Gate
from hotset.kernels.narrow_product import RUN_COLUMNS, in_order, narrow_product
from hotset.weight_format import WeightFormat

_SCALES = {"float32": 0, "bfloat16": 1, "float16": 2, "e8m0": 3, "e4m3": 4}


class Layout(Protocol):
    """See `experts.narrow.NarrowLayout`, and `NarrowMatrix` there."""

    form: WeightFormat
    matrices: tuple[Any, ...]


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
    IN_PAIRS: tl.constexpr,
    HIDDEN_WIDTH: tl.constexpr,
    MIDDLE_WIDTH: tl.constexpr,
):
    HALF: tl.constexpr = COLUMNS // 2
    num_tiles: tl.constexpr = (MIDDLE + HALF - 1) // HALF
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
    first_column = (tl.program_id(0) % num_tiles) * HALF
    both = tl.arange(0, COLUMNS)  # gate, up, gate, ...
    real = tl.minimum(first_column + both // 2, MIDDLE - 1)  # beyond the last: the last, not stored
    if ALPHA != 0:  # neighbours in memory
        row = 2 * real + both % 2
        scale_row = row // PLANES[6]
    else:
        row = real + both % 2 * MIDDLE
        scale_row = real // PLANES[6] + both % 2 * SCALE_ROWS
    x_at = hidden + token.to(tl.int64)[None, :] * HIDDEN_WIDTH
    sums = narrow_product(
        payload, row, scale_row, x_at, PLANES, HIDDEN, BLOCK_ROWS, COLUMNS, DEPTH, IN_PAIRS
    )
    if HAS_BIAS:
        sums += tl.load(biases + expert * (2 * MIDDLE) + row).to(tl.float32)[:, None]
    gate, up = tl.split(tl.permute(tl.reshape(sums, [HALF, 2, BLOCK_ROWS]), [0, 2, 1]))
    if ALPHA != 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        middle = gate * tl.sigmoid(gate * ALPHA) * up
    else:
        middle = gate * tl.sigmoid(gate) * up
    column = first_column + tl.arange(0, HALF)
    column_at = column
    if PLANES[0] != 0:  # as the next product reads them
        column_at = in_order(column)
    out_at = out + place.to(tl.int64)[None, :] * MIDDLE_WIDTH + column_at[:, None]
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
    IN_PAIRS: tl.constexpr,
    MIDDLE_WIDTH: tl.constexpr,
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
    x_at = middle + source.to(tl.int64)[None, :] * MIDDLE_WIDTH
    sums = narrow_product(
        payload, real, real // PLANES[6], x_at, PLANES, MIDDLE, BLOCK_ROWS, COLUMNS, DEPTH, IN_PAIRS
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
    tiles = narrow_tiles_for(ids.numel(), num_experts, layout.form, hidden.device)
    routing = route_rows(ids.view(-1), num_experts, tiles.block_rows)
    source = _in_runs(hidden) if layout.form.code_bits == 4 else hidden
    middle_width = _padded(middle_size) if layout.form.code_bits == 4 else middle_size
    make = hidden.new_empty if middle_width == middle_size else hidden.new_zeros
    middle = make(num_tokens * top_k, middle_width)
    rows = hidden.new_empty(num_tokens * top_k, hidden_size)
    out = torch.empty_like(hidden)
    if not len(routing.blocks):
        return out
    of_up, of_down = (hidden, hidden) if biases is None else biases
    shared = {
        "HIDDEN": hidden_size, "MIDDLE": middle_size, "MIDDLE_WIDTH": middle_width,
        "BLOCK_ROWS": tiles.block_rows, "HAS_BIAS": biases is not None,
        "IN_PAIRS": _opens_in_pairs(layout.form, hidden),
    }  # fmt: skip
    for number, payloads in enumerate(by_pass):
        before_pass(number)
        _gated_up[(len(routing.blocks) * triton.cdiv(middle_size, tiles.up.columns // 2),)](
            source, payloads, routing.rows, routing.blocks, routing.num_blocks, of_up, middle,
            PLANES=planes_of(layout.form, up), HIDDEN_WIDTH=source.shape[1], TOP_K=top_k,
            SCALE_ROWS=_scale_rows(up, middle_size), ALPHA=gate.alpha, LIMIT=gate.limit,
            COLUMNS=tiles.up.columns, DEPTH=tiles.up.depth,
            num_warps=tiles.up.num_warps, num_stages=tiles.up.num_stages, **shared,
        )  # fmt: skip
        _weighted_down[(len(routing.blocks) * triton.cdiv(hidden_size, tiles.down.columns),)](
            middle, payloads, routing.rows, routing.blocks, routing.num_blocks, of_down, weights,
            rows, PLANES=planes_of(layout.form, down),
            COLUMNS=tiles.down.columns, DEPTH=tiles.down.depth,
            num_warps=tiles.down.num_warps, num_stages=tiles.down.num_stages, **shared,
        )  # fmt: skip
    sum_rows(rows, ids, out, num_experts=num_experts)
    return out


def planes_of(form: WeightFormat, matrix: Any) -> tuple[Any, ...]:
    """Code; where codes, scales and what is more begin; a group's columns; kind of scales; rows."""
    more = -1 if matrix.more is None else matrix.more.offset
    group = form.columns or triton.next_power_of_2(matrix.shape[-1])
    rows = form.rows or matrix.shape[-2]
    scale = _SCALES[str(form.scale)]
    return CODES[form.code], matrix.codes.offset, matrix.scales.offset, more, group, scale, rows


def _scale_rows(up: Any, middle_size: int) -> int:
    """Rows of scales before those of what the gate multiplies."""
    return int(up.scales.shape[-2]) if len(up.shape) == 3 else middle_size


def _padded(columns: int) -> int:
    """Whole runs."""
    return -(-columns // RUN_COLUMNS) * RUN_COLUMNS


def _in_runs(hidden: torch.Tensor) -> torch.Tensor:
    """`[T, H]` to `[T, whole runs]`, each in the order of `in_order`; zeros at the end."""
    num_tokens, size = hidden.shape
    if size != _padded(size):
        hidden = functional.pad(hidden, (0, _padded(size) - size))
    runs = hidden.view(num_tokens, -1, 4, 2, 2, 2, 2).permute(0, 1, 6, 3, 4, 2, 5)
    return runs.reshape(num_tokens, -1)


def _opens_in_pairs(form: WeightFormat, hidden: torch.Tensor) -> bool:
    """Whether codes are opened by PTX, and not by Triton's operations."""
    if hidden.device.type != "cuda":
        return False
    if form.code == "e2m1":
        return hidden.dtype == torch.bfloat16
    return form.code == "e4m3" or f"torch.{form.scale}" == str(hidden.dtype)


def narrow_tiles_for(
    num_rows: int, num_experts: int, form: WeightFormat, device: torch.device
) -> Tiles:
    """The tiles for `num_rows` rows of experts in `form` on this device."""
    tiles = TUNINGS[device.type].tiles(
        num_rows, num_experts, shared_bytes=shared_bytes(device), narrow=True
    )
    return replace(tiles, up=_suited(tiles.up, form), down=_suited(tiles.down, form))


def _suited(tile: Tile, form: WeightFormat) -> Tile:
    """With 8 warps, where each column of a tile has one scale of 16 bits.

    With fewer threads than two per scale Triton 3.6 has widened weights pass through shared memory.
    """
    is_wide = form.columns is None or form.columns >= tile.depth
    if is_wide and form.scale in ("bfloat16", "float16") and tile.columns >= 32 * tile.num_warps:
        return replace(tile, num_warps=8)
    return tile
