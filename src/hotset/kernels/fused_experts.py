"""Experts with a gate in few launches: route, product with activation, product, sum.

Weights are found by address, one for each expert, so that an expert may be anywhere the device
can read: in the layer's stacked weight, in a slot, in a buffer on its way.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from hotset.cost.tuning import TUNINGS, Tiles
from hotset.kernels.expert_routing import Routing, route_rows

_SUM_COLUMNS = 1024


@triton.jit
def load_block(block):  # type: ignore[no-untyped-def]
    """Expert, first place and end of a block; anything if there is no such block."""
    return tl.load(block), tl.load(block + 1), tl.load(block + 2)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_up(  # type: ignore[no-untyped-def]
    hidden,
    addresses,
    rows,
    blocks,
    num_blocks,
    out,
    HIDDEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Programs of one block, and then those of one expert, follow each other: they meet in L2.
    num_tiles: tl.constexpr = (MIDDLE + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // num_tiles
    expert, first, end = load_block(blocks + 3 * block)
    if block >= tl.load(num_blocks):
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    inside = place < end
    token = tl.load(rows + place, mask=inside, other=0) // TOP_K
    address = tl.load(addresses + expert)
    if address == 0:
        return
    # Without this hint, which has to be on the pointer, weights are loaded number by number.
    weight = tl.multiple_of(address.to(tl.pointer_type(hidden.dtype.element_ty)), 16)
    column = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    x_at = hidden + token.to(tl.int64)[:, None] * HIDDEN + d[None, :]
    # Columns beyond the last are computed as the last again, and not stored.
    gate_at = weight + tl.minimum(column, MIDDLE - 1)[None, :] * HIDDEN + d[:, None]
    up_at = gate_at + MIDDLE * HIDDEN
    gate = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    up = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        if HIDDEN % DEPTH == 0:
            x = tl.load(x_at + start)
            gate_weight = tl.load(gate_at + start)
            up_weight = tl.load(up_at + start)
        else:
            is_real = start + d < HIDDEN
            x = tl.load(x_at + start, mask=is_real[None, :], other=0.0)
            gate_weight = tl.load(gate_at + start, mask=is_real[:, None], other=0.0)
            up_weight = tl.load(up_at + start, mask=is_real[:, None], other=0.0)
        gate = tl.dot(x, gate_weight, gate)
        up = tl.dot(x, up_weight, up)
    middle = gate * tl.sigmoid(gate) * up
    out_at = out + place.to(tl.int64)[:, None] * MIDDLE + column[None, :]
    is_real = inside[:, None] & (column < MIDDLE)[None, :]
    tl.store(out_at, middle.to(out.dtype.element_ty), mask=is_real)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_down(  # type: ignore[no-untyped-def]
    middle,
    addresses,
    rows,
    blocks,
    num_blocks,
    row_weights,
    out,
    HIDDEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    num_tiles: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) // num_tiles
    expert, first, end = load_block(blocks + 3 * block)
    if block >= tl.load(num_blocks):
        return
    place = first + tl.arange(0, BLOCK_ROWS)
    inside = place < end
    row = tl.load(rows + place, mask=inside, other=0)
    address = tl.load(addresses + expert)
    if address == 0:
        return
    weight = tl.multiple_of(address.to(tl.pointer_type(middle.dtype.element_ty)), 16)
    column = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    # Places beyond the block's are other blocks' or none's: computed as the first, not stored.
    source = tl.where(inside, place, first)
    x_at = middle + source.to(tl.int64)[:, None] * MIDDLE + d[None, :]
    weight_at = weight + tl.minimum(column, HIDDEN - 1)[None, :] * MIDDLE + d[:, None]
    sums = tl.zeros([BLOCK_ROWS, COLUMNS], tl.float32)
    for start in range(0, MIDDLE, DEPTH):
        if MIDDLE % DEPTH == 0:
            x = tl.load(x_at + start)
            down_weight = tl.load(weight_at + start)
        else:
            is_real = start + d < MIDDLE
            x = tl.load(x_at + start, mask=is_real[None, :], other=0.0)
            down_weight = tl.load(weight_at + start, mask=is_real[:, None], other=0.0)
        sums = tl.dot(x, down_weight, sums)
    sums *= tl.load(row_weights + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    out_at = out + row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    is_real = inside[:, None] & (column < HIDDEN)[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=is_real)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(  # type: ignore[no-untyped-def]
    rows,
    ids,
    out,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(TOP_K):  # all reads are under way before the first sum
        row = token * TOP_K + k
        width = tl.where(
            tl.load(ids + row) < NUM_EXPERTS, HIDDEN, 0
        )  # no program writes the others
        sums += tl.load(rows + row * HIDDEN + column, mask=column < width, other=0.0)
    at = out + token * HIDDEN + column
    tl.store(at, sums.to(out.dtype.element_ty), mask=column < HIDDEN)


def fused_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up_addresses: torch.Tensor,
    down_addresses: torch.Tensor,
    middle_size: int,
    *,
    before_pass: Callable[[int], None] = lambda number: None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, where an expert is `down(silu(gate) * up)`.

    T = tokens, K = experts of a token, E = experts, H = hidden size, I = `middle_size`. The
    weights are of the dtype of `hidden`, row-major, each matrix of an expert in one piece at an
    address of 16 bytes and of less than 2^31 numbers.

    Args:
        hidden: `[T, H]` bfloat16 or float16, contiguous.
        ids: `[T, K]` integer, contiguous, not negative; those of E and more add nothing.
        weights: `[T, K]` floats, contiguous.
        up_addresses: `[E]` int64 on the device: where each expert's `[2 * I, H]` begins, the rows
            of the gate first. Those of experts that are in `ids` must be there. Or `[P, E]`, of P
            passes, each of which computes the experts whose address is not 0 there.
        down_addresses: likewise, of `[H, I]`.
        middle_size: I.
        before_pass: called with the number of each pass, before its launches.

    Returns:
        `[T, H]`, dtype of `hidden`. The middle and each weighted row are rounded to it; products,
        the activation, weights and the sum, in the order of K, are in float32. A token's values
        depend on its own row, ids and weights and on the tiles, which T * K and E choose.

    Cost: the weights of experts that got rows are read from HBM once, bound by that until about
    a hundred rows an expert. Launches of fixed shape; nothing is asked of the host.
    Reference: `tests/kernels/test_fused_experts.py`.
    """
    num_tokens, top_k = ids.shape
    num_experts = up_addresses.shape[-1]
    up_of, down_of = up_addresses.view(-1, num_experts), down_addresses.view(-1, num_experts)
    tiles = tiles_for(ids.numel(), num_experts, hidden.device)
    routing = route_rows(ids.view(-1), num_experts, tiles.block_rows)
    middle = hidden.new_empty(num_tokens * top_k, middle_size)
    rows = hidden.new_empty(num_tokens * top_k, hidden.shape[1])
    for number, (up, down) in enumerate(zip(up_of, down_of, strict=True)):
        before_pass(number)
        gated_up(hidden, routing, up, middle, top_k=top_k, tiles=tiles)
        weighted_down(middle, routing, down, weights, rows, tiles=tiles)
    out = torch.empty_like(hidden)
    sum_rows(rows, ids, out, num_experts=num_experts)
    return out


def gated_up(
    hidden: torch.Tensor,
    routing: Routing,
    addresses: torch.Tensor,
    out: torch.Tensor,
    *,
    top_k: int,
    tiles: Tiles,
) -> None:
    """Write `silu(gate) * up` of each row to its place among the sorted rows.

    Args:
        hidden: `[T, H]`, contiguous.
        routing: of the T * K rows, in blocks of `tiles.block_rows`.
        addresses: `[E]` int64 on the device, of `[2 * I, H]`; see `fused_experts`. Rows of an
            expert whose address is 0 are left out, to be computed by another call.
        out: `[T * K, I]`, contiguous, dtype of `hidden`. Mutated.
        top_k: K.
        tiles: of the program.
    """
    middle_size, tile = out.shape[1], tiles.up
    columns = tile.columns // 2
    num_programs = len(routing.blocks) * triton.cdiv(middle_size, columns)
    if num_programs == 0:
        return
    _gated_up[(num_programs,)](
        hidden,
        addresses,
        routing.rows,
        routing.blocks,
        routing.num_blocks,
        out,
        HIDDEN=hidden.shape[1],
        MIDDLE=middle_size,
        TOP_K=top_k,
        BLOCK_ROWS=tiles.block_rows,
        COLUMNS=columns,
        DEPTH=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def weighted_down(
    middle: torch.Tensor,
    routing: Routing,
    addresses: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    *,
    tiles: Tiles,
) -> None:
    """Write the output of each row, times its weight, to where the row is in the batch.

    Args:
        middle: `[T * K, I]`, what `gated_up` wrote.
        routing: as for that.
        addresses: `[E]` int64 on the device, of `[H, I]`; those of 0 as for `gated_up`.
        weights: `[T, K]` floats, contiguous.
        out: `[T * K, H]`, contiguous, dtype of `middle`. Rows with an expert here are
            written.
        tiles: as for `gated_up`.
    """
    hidden_size, tile = out.shape[1], tiles.down
    num_programs = len(routing.blocks) * triton.cdiv(hidden_size, tile.columns)
    if num_programs == 0:
        return
    _weighted_down[(num_programs,)](
        middle,
        addresses,
        routing.rows,
        routing.blocks,
        routing.num_blocks,
        weights,
        out,
        HIDDEN=hidden_size,
        MIDDLE=middle.shape[1],
        BLOCK_ROWS=tiles.block_rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def sum_rows(rows: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, *, num_experts: int) -> None:
    """Write the sum of each token's rows, in the order of K and in float32.

    Args:
        rows: `[T * K, H]`, contiguous; those with ids of `num_experts` and more are not read.
        ids: `[T, K]` integer, contiguous.
        out: `[T, H]`, contiguous. Mutated.
        num_experts: E.
    """
    num_tokens, hidden_size = out.shape
    if num_tokens == 0:
        return
    columns = min(_SUM_COLUMNS, triton.next_power_of_2(hidden_size))
    _sum_rows[(num_tokens, triton.cdiv(hidden_size, columns))](
        rows,
        ids,
        out,
        NUM_EXPERTS=num_experts,
        HIDDEN=hidden_size,
        TOP_K=ids.shape[1],
        COLUMNS=columns,
    )


def tiles_for(num_rows: int, num_experts: int, device: torch.device) -> Tiles:
    """The tiles for `num_rows` rows on this device."""
    return TUNINGS[device.type].tiles(num_rows, num_experts, shared_bytes=shared_bytes(device))


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program can have."""
    if device.type == "cpu":  # the interpreter has none, and any amount will do
        return 2**31
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
