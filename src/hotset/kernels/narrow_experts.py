"""Experts in few bits, computed as they lie.

As `fused_experts`, but an expert is one address, where its payload begins, and the planes of both
matrices lie at fixed distances from it (`weight_format`). `narrow_product` widens codes in
registers, or inputs are rounded to 8 bits too (`eight_bit`).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from hotset.cost.tuning import Tiles
from hotset.kernels.eight_bit import eight_bit_product
from hotset.kernels.expert_routing import Routing, route_rows
from hotset.kernels.fused_experts import load_block, sum_rows
from hotset.kernels.narrow_forms import Gate
from hotset.kernels.narrow_launch import (
    Inputs,
    as_inputs,
    narrow_tiles_for,
    opens_in_pairs,
    planes_of,
    whole_runs,
)
from hotset.kernels.narrow_product import in_order, narrow_product
from hotset.weight_format import WeightFormat


class Layout(Protocol):
    """See `experts.narrow.NarrowLayout`, and `linear.narrow_matrix.NarrowMatrix`."""

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
    hidden_scales,
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
    NUM_SCALES: tl.constexpr,
):
    HALF: tl.constexpr = COLUMNS // 2
    num_tiles: tl.constexpr = (MIDDLE + HALF - 1) // HALF
    block = tl.program_id(0) // num_tiles
    expert, first, end = load_block(blocks + 3 * block)
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
    if NUM_SCALES:
        scales_at = hidden_scales + token * NUM_SCALES
        sums = eight_bit_product(
            payload, row, scale_row, x_at, scales_at, PLANES, HIDDEN, BLOCK_ROWS, COLUMNS, DEPTH
        )
    else:
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
    if PLANES[0] != 0 and PLANES[0] != 3:  # 4 bits: as the next product reads them
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
    middle_scales,
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
    NUM_SCALES: tl.constexpr,
):
    num_tiles: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // num_tiles
    expert, first, end = load_block(blocks + 3 * block)
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
    scale_row = real // PLANES[6]
    if NUM_SCALES:
        scales_at = middle_scales + source * NUM_SCALES
        sums = eight_bit_product(
            payload, real, scale_row, x_at, scales_at, PLANES, MIDDLE, BLOCK_ROWS, COLUMNS, DEPTH
        )
    else:
        sums = narrow_product(
            payload, real, scale_row, x_at, PLANES, MIDDLE, BLOCK_ROWS, COLUMNS, DEPTH, IN_PAIRS
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
        `[T, H]`, dtype of `hidden`. Weights in small groups are widened to it as
        `NarrowLayout.dequantise` does; scales of large groups multiply sums, and round no weight.
        The middle and each weighted row are rounded to it; all else is in float32. A token's values
        depend on its own row, ids and weights and on the tiles, which T * K and E choose.

    Cost: the payloads of experts that got rows are read once. Launches of fixed shape; nothing is
    asked of the host.
    Reference: `tests/kernels/test_narrow_kernels.py`.
    """
    num_tokens, top_k = ids.shape
    by_pass = addresses.view(-1, addresses.shape[-1])
    num_experts = by_pass.shape[1]
    tiles = narrow_tiles_for(ids.numel(), num_experts, layout.form, hidden.device)
    routing = route_rows(ids.view(-1), num_experts, tiles.block_rows)
    source = as_inputs(hidden, layout.form)
    middle = empty_middle(hidden, ids.numel(), layout)
    rows = hidden.new_empty(num_tokens * top_k, hidden.shape[1])
    out = torch.empty_like(hidden)
    if not len(routing.blocks):
        return out
    of_up, of_down = biases or (None, None)
    for number, payloads in enumerate(by_pass):
        before_pass(number)
        gated_up(source, routing, payloads, layout, gate, of_up, middle, top_k=top_k, tiles=tiles)
        weighted_down(
            middle_inputs(middle, layout.form), routing, payloads, layout, of_down, weights, rows,
            tiles=tiles,
        )  # fmt: skip
    sum_rows(rows, ids, out, num_experts=num_experts)
    return out


def empty_middle(hidden: torch.Tensor, num_rows: int, layout: Layout) -> torch.Tensor:
    """What `gated_up` writes: `[R, width]`, dtype of `hidden`; zeros where it has no columns."""
    size = layout.matrices[1].shape[-1]
    width = whole_runs(size) if layout.form.code_bits == 4 else size
    make = hidden.new_empty if width == size else hidden.new_zeros
    return make(num_rows, width)


def middle_inputs(middle: torch.Tensor, form: WeightFormat) -> Inputs:
    """What `gated_up` wrote, for `weighted_down`: of 4-bit codes it is in their order."""
    if form.input_bits == 8:
        return as_inputs(middle, form)
    return Inputs(middle, None)


def gated_up(
    source: Inputs,
    routing: Routing,
    payloads: torch.Tensor,
    layout: Layout,
    gate: Gate,
    biases: torch.Tensor | None,
    out: torch.Tensor,
    *,
    top_k: int,
    tiles: Tiles,
) -> None:
    """Write what is between the products, of each row, to its place among the sorted rows.

    Args:
        source: of the tokens; see `as_inputs`.
        routing: of the T * K rows, in blocks of `tiles.block_rows`; at least one.
        payloads: `[E]` addresses; see `narrow_experts`.
        layout: likewise.
        gate: likewise.
        biases: `[E, 2 * I]`, or None.
        out: see `empty_middle`. Mutated.
        top_k: K.
        tiles: of the program.
    """
    up, down = layout.matrices
    hidden_size, middle_size, tile = up.shape[-1], down.shape[-1], tiles.up
    _gated_up[(len(routing.blocks) * triton.cdiv(middle_size, tile.columns // 2),)](
        source.values, payloads, routing.rows, routing.blocks, routing.num_blocks,
        out if biases is None else biases, out if source.scales is None else source.scales, out,
        PLANES=planes_of(layout.form, up), HIDDEN=hidden_size, MIDDLE=middle_size, TOP_K=top_k,
        BLOCK_ROWS=tiles.block_rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        SCALE_ROWS=_scale_rows(up, middle_size), ALPHA=gate.alpha, LIMIT=gate.limit,
        HAS_BIAS=biases is not None, IN_PAIRS=opens_in_pairs(layout.form, out),
        HIDDEN_WIDTH=source.values.shape[1], MIDDLE_WIDTH=out.shape[1],
        NUM_SCALES=source.num_scales, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def weighted_down(
    middle: Inputs,
    routing: Routing,
    payloads: torch.Tensor,
    layout: Layout,
    biases: torch.Tensor | None,
    weights: torch.Tensor,
    out: torch.Tensor,
    *,
    tiles: Tiles,
) -> None:
    """Write the output of each row, times its weight, to where the row is in the batch.

    Args:
        middle: see `middle_inputs`.
        routing: as for `gated_up`.
        payloads: likewise.
        layout: likewise.
        biases: `[E, H]`, or None.
        weights: `[T, K]`.
        out: `[T * K, H]`. Mutated.
        tiles: as for `gated_up`.
    """
    down, tile = layout.matrices[1], tiles.down
    hidden_size, middle_size = down.shape
    _weighted_down[(len(routing.blocks) * triton.cdiv(hidden_size, tile.columns),)](
        middle.values, payloads, routing.rows, routing.blocks, routing.num_blocks,
        out if biases is None else biases, weights,
        out if middle.scales is None else middle.scales, out,
        PLANES=planes_of(layout.form, down), HIDDEN=hidden_size, MIDDLE=middle_size,
        BLOCK_ROWS=tiles.block_rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        HAS_BIAS=biases is not None, IN_PAIRS=opens_in_pairs(layout.form, out),
        MIDDLE_WIDTH=middle.values.shape[1], NUM_SCALES=middle.num_scales,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _scale_rows(up: Any, middle_size: int) -> int:
    """Rows of scales before those of what the gate multiplies."""
    return int(up.scales.shape[-2]) if len(up.shape) == 3 else middle_size
