"""Experts in few bits, computed as they lie.

As `fused_experts`, but an expert is one address, where its payload begins, and the planes of both
matrices lie at fixed distances from it (`weight_format`). `narrow_product` widens codes in
registers.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from hotset.kernels.expert_routing import route_rows
from hotset.kernels.fused_experts import load_block, sum_rows
from hotset.kernels.narrow_forms import Gate
from hotset.kernels.narrow_launch import (
    in_runs,
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
    source = in_runs(hidden) if layout.form.code_bits == 4 else hidden
    middle_width = whole_runs(middle_size) if layout.form.code_bits == 4 else middle_size
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
        "IN_PAIRS": opens_in_pairs(layout.form, hidden),
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


def _scale_rows(up: Any, middle_size: int) -> int:
    """Rows of scales before those of what the gate multiplies."""
    return int(up.scales.shape[-2]) if len(up.shape) == 3 else middle_size
