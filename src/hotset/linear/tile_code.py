"""Products with narrow weights in tiles, in LLVM's language, compiled for the processor at hand.

PyTorch's own products for CPUs take 4 bits in bfloat16 only, and round each output to 8 bits: a
token would depend on how many rows share a step. A compiler of C is not on each machine; LLVM is a
package (`llvmlite`). The code is written once and compiled for AVX-512, AVX2 or NEON in under a
second.

For each output the sum goes over the columns in order, by fused multiply-adds in float32, whatever
the number of rows, tiles and threads: the same row gives the same bits in any step.

- Up to `FEW_ROWS` rows: codes are widened in registers and used there.
- More: `BLOCK_COLUMNS` columns of a tile are widened once, for all rows, into 32 KiB of the stack.

Threads take a tile each, from a common counter, until none is left.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from hotset.linear.native_code import (
    ADDRESS,
    BYTES,
    FLOAT,
    FLOATS,
    I1,
    I64,
    INTS,
    LANES,
    ZEROS,
    Value,
    Writer,
    number,
)
from hotset.linear.tiles import TILE_ROWS, TileFormat

# What a call gets, each 8 bytes; the counter is written. Those of `ADDRESSES` are such.
ARGUMENTS = ("rows", "counter", "x", "codes", "scales", "factors", "out", "columns", "tiles")
ADDRESSES = {"x", "codes", "scales", "factors", "out"}
FEW_ROWS = 8
BLOCK_COLUMNS = 256

_HALVES = ir.VectorType(ir.HalfType(), LANES)
_FLOATS_BYTES = 4 * LANES

Pair = list[Value]  # vectors of the lower and the upper half of a tile's rows


@dataclass(frozen=True, slots=True)
class _Planes:
    """Where the parts of a tile begin: values that are addresses."""

    codes: Value
    scales: Value
    factors: Value


def make_module(form: TileFormat, *, max_rows: int) -> ir.Module:
    """The function `product` for weights of one form.

    Args:
        form: of the weights.
        max_rows: rows that are computed at once, a power of 2; what the processor has registers
            for: two for each row, three to widen.
    """
    module = ir.Module("hotset")
    counts = [1]
    while counts[-1] < max_rows:
        counts.append(2 * counts[-1])
    few = [count for count in counts if count <= max(1, max_rows // 2)]
    fused = {count: _fused(module, form, count) for count in few}
    open_block = _open_block(module, form)
    summed = {count: _summed(module, count) for count in counts}
    _product(module, form, fused, open_block, summed)
    return module


def _pairs(w: Writer, kind: Any, plane: Value, index: Value, num_parts: int) -> list[Pair]:
    """The parts of a span or a group as they are stored, `num_parts` pairs of vectors."""
    size = 2 if kind is _HALVES else 1
    begin = w.times(index, num_parts * TILE_ROWS * size)
    return [
        [w.load(kind, plane, begin, (part * TILE_ROWS + half * LANES) * size) for half in range(2)]
        for part in range(num_parts)
    ]


def _group(w: Writer, form: TileFormat, planes: _Planes, group: Value) -> list[Pair]:
    """Scale and minimum of a group, in float32: `form.num_parts` pairs of vectors."""
    span = w.b.udiv(group, number(form.span // form.group))
    parts = [
        [w.b.fpext(vector, FLOATS) for vector in pair]
        for pair in _pairs(w, _HALVES, planes.scales, span, form.num_parts)
    ]
    if not form.has_factors:
        return parts
    factors = _pairs(w, BYTES, planes.factors, group, form.num_parts)
    return [
        [
            w.b.fmul(vector, w.b.sitofp(w.b.sext(factor, INTS), FLOATS))
            for vector, factor in zip(*pairs, strict=True)
        ]
        for pairs in zip(parts, factors, strict=True)
    ]


def _column(w: Writer, form: TileFormat, planes: _Planes, column: Value, parts: list[Pair]) -> Pair:
    """The weights of one column, a pair of vectors."""
    if form.code_bits == 4:
        both = w.load(BYTES, planes.codes, w.times(column, LANES))
        low = w.b.and_(both, ir.Constant(BYTES, [15] * LANES))
        high = w.b.lshr(both, ir.Constant(BYTES, [4] * LANES))
        codes = [w.b.uitofp(w.b.zext(code, INTS), FLOATS) for code in (low, high)]
    else:
        begin = w.times(column, TILE_ROWS)
        stored = [w.load(BYTES, planes.codes, begin, half * LANES) for half in range(2)]
        codes = [w.b.sitofp(w.b.sext(code, INTS), FLOATS) for code in stored]
    if form.middle:
        middle = ir.Constant(FLOATS, [float(form.middle)] * LANES)
        codes = [w.b.fsub(code, middle) for code in codes]
    if form.has_minimum:
        return [w.fma(code, *part) for code, *part in zip(codes, *parts, strict=True)]
    return [w.b.fmul(code, scale) for code, scale in zip(codes, parts[0], strict=True)]


def _add_products(
    w: Writer, sums: list[Value], weights: Pair, inputs: list[Value], column: Value
) -> None:
    """Add a column's products to the sums of each row, in place; two vectors per row."""
    for row, address in enumerate(inputs):
        x = w.spread(w.load(FLOAT, address, w.times(column, 4)))
        for half in range(2):
            place = 2 * row + half
            sums[place] = w.fma(x, weights[half], sums[place])


def _row_addresses(w: Writer, first: Value, stride: Value, count: int) -> list[Value]:
    return [w.at(first, w.times(stride, row)) for row in range(count)]


def _store_sums(w: Writer, sums: list[Value], outputs: list[Value]) -> None:
    for place, value in enumerate(sums):
        w.store(value, outputs[place // 2], place % 2 * _FLOATS_BYTES)


def _fused(module: ir.Module, form: TileFormat, count: int) -> Value:
    """A tile's outputs of `count` rows, widening in registers. Strides are in bytes."""
    kinds = [ADDRESS, I64, ADDRESS, ADDRESS, ADDRESS, I64, ADDRESS, I64]
    w = Writer(module, f"fused_{count}", kinds)
    w.function.linkage = "internal"
    x, x_stride, codes, scales, factors, num_groups, out, out_stride = w.arguments
    planes = _Planes(codes, scales, factors)
    inputs = _row_addresses(w, x, x_stride, count)
    sums = [ZEROS] * (2 * count)
    with w.loop(number(0), num_groups, 1, sums) as (group, group_sums):
        parts = _group(w, form, planes, group)
        begin = w.times(group, form.group)
        with w.loop(number(0), number(form.group), 1, group_sums) as (offset, sums):
            column = w.b.add(begin, offset)
            weights = _column(w, form, planes, column, parts)
            _add_products(w, sums, weights, inputs, column)
        group_sums[:] = sums
    _store_sums(w, group_sums, _row_addresses(w, out, out_stride, count))
    return w.end()


def _open_block(module: ir.Module, form: TileFormat) -> Value:
    """Some groups of a tile to float32 `[columns, 32]`."""
    kinds = [ADDRESS, ADDRESS, ADDRESS, I64, ADDRESS]
    w = Writer(module, "open_block", kinds)
    w.function.linkage = "internal"
    codes, scales, factors, num_groups, wide = w.arguments
    planes = _Planes(codes, scales, factors)
    with w.loop(number(0), num_groups, 1, []) as (group, _):
        parts = _group(w, form, planes, group)
        begin = w.times(group, form.group)
        with w.loop(number(0), number(form.group), 1, []) as (offset, _):
            column = w.b.add(begin, offset)
            weights = _column(w, form, planes, column, parts)
            for half, vector in enumerate(weights):
                w.store(vector, wide, w.times(column, 2 * _FLOATS_BYTES), half * _FLOATS_BYTES)
    return w.end()


def _summed(module: ir.Module, count: int) -> Value:
    """Add the products of `count` rows with widened columns to a tile's outputs."""
    kinds = [ADDRESS, I64, ADDRESS, I64, ADDRESS, I64, I1]
    w = Writer(module, f"summed_{count}", kinds)
    w.function.linkage = "internal"
    x, x_stride, wide, num_columns, out, out_stride, is_first = w.arguments
    inputs = _row_addresses(w, x, x_stride, count)
    outputs = _row_addresses(w, out, out_stride, count)
    before = w.b.block
    with w.b.if_then(w.b.not_(is_first)):
        inside = w.b.block
        loaded = [
            w.load(FLOATS, address, half * _FLOATS_BYTES)
            for address in outputs
            for half in range(2)
        ]
    sums = []
    for value in loaded:
        phi = w.b.phi(FLOATS)
        phi.add_incoming(ZEROS, before)
        phi.add_incoming(value, inside)
        sums.append(phi)
    with w.loop(number(0), num_columns, 1, sums) as (column, sums):
        begin = w.times(column, 2 * _FLOATS_BYTES)
        weights = [w.load(FLOATS, wide, begin, half * _FLOATS_BYTES) for half in range(2)]
        _add_products(w, sums, weights, inputs, column)
    _store_sums(w, sums, outputs)
    return w.end()


def _product(
    module: ir.Module,
    form: TileFormat,
    fused: dict[int, Value],
    open_block: Value,
    summed: dict[int, Value],
) -> None:
    """`product(address of the arguments)`: tiles from the counter until none is left."""
    w = Writer(module, "product", [ADDRESS])
    (arguments,) = w.arguments
    given = {
        name: w.b.load(
            w.at(arguments, 8 * place), align=8, typ=ADDRESS if name in ADDRESSES else I64
        )
        for place, name in enumerate(ARGUMENTS)
        if name != "counter"
    }
    counter = w.at(arguments, 8 * ARGUMENTS.index("counter"))
    wide = w.b.alloca(ir.ArrayType(FLOAT, BLOCK_COLUMNS * TILE_ROWS))
    wide.align = 64
    head, body, after = (w.function.append_basic_block() for _ in range(3))
    w.b.branch(head)
    w.b.position_at_end(head)
    tile = w.b.atomic_rmw("add", counter, number(1), "monotonic")
    w.b.cbranch(w.b.icmp_signed("<", tile, given["tiles"]), body, after)
    w.b.position_at_end(body)
    planes = _tile_planes(w, form, given, tile)
    is_few = w.b.icmp_signed("<=", given["rows"], number(FEW_ROWS))
    with w.b.if_else(is_few) as (few, many):
        with few:
            _few_rows(w, form, given, planes, tile, fused)
        with many:
            _many_rows(w, form, given, planes, tile, wide, open_block, summed)
    w.b.branch(head)
    w.b.position_at_end(after)
    w.end()


def _tile_planes(w: Writer, form: TileFormat, given: dict[str, Value], tile: Value) -> _Planes:
    """Where a tile's parts begin."""
    columns = given["columns"]
    sizes = _column_bytes(w, form, columns)
    return _Planes(
        *(
            w.at(given[name], w.b.mul(tile, size))
            for name, size in zip(("codes", "scales", "factors"), sizes, strict=True)
        )
    )


def _column_bytes(w: Writer, form: TileFormat, columns: Value) -> list[Value]:
    """Bytes of a tile's codes, scales and factors of some columns, whole spans."""
    spans = w.b.udiv(columns, number(form.span))
    groups = w.b.udiv(columns, number(form.group))
    factor_bytes = form.num_parts * TILE_ROWS if form.has_factors else 0
    return [
        w.times(columns, TILE_ROWS * form.code_bits // 8),
        w.times(spans, form.num_parts * TILE_ROWS * 2),
        w.times(groups, factor_bytes),
    ]


def _by_counts(w: Writer, rows: Value, functions: dict[int, Value], call: Any) -> None:
    """Call the functions for all rows, as many at once as there is a function for."""
    start = number(0)
    for count in sorted(functions, reverse=True):
        stop = w.b.sub(rows, number(count - 1))
        with w.loop(start, stop, count, []) as (row, _):
            call(functions[count], row)
        start = row


def _few_rows(
    w: Writer,
    form: TileFormat,
    given: dict[str, Value],
    planes: _Planes,
    tile: Value,
    fused: dict[int, Value],
) -> None:
    x_stride = w.times(given["columns"], 4)
    out_stride = w.times(given["tiles"], 4 * TILE_ROWS)
    out = w.at(given["out"], w.times(tile, 4 * TILE_ROWS))
    num_groups = w.b.udiv(given["columns"], number(form.group))

    def call(function: Value, row: Value) -> None:
        x = w.at(given["x"], w.b.mul(row, x_stride))
        to = w.at(out, w.b.mul(row, out_stride))
        parts = (planes.codes, planes.scales, planes.factors)
        w.b.call(function, [x, x_stride, *parts, num_groups, to, out_stride])

    _by_counts(w, given["rows"], fused, call)


def _many_rows(
    w: Writer,
    form: TileFormat,
    given: dict[str, Value],
    planes: _Planes,
    tile: Value,
    wide: Value,
    open_block: Value,
    summed: dict[int, Value],
) -> None:
    x_stride = w.times(given["columns"], 4)
    out_stride = w.times(given["tiles"], 4 * TILE_ROWS)
    out = w.at(given["out"], w.times(tile, 4 * TILE_ROWS))
    with w.loop(number(0), given["columns"], BLOCK_COLUMNS, []) as (begin, _):
        left = w.b.sub(given["columns"], begin)
        is_last = w.b.icmp_signed("<", left, number(BLOCK_COLUMNS))
        num_columns = w.b.select(is_last, left, number(BLOCK_COLUMNS))
        offsets = _column_bytes(w, form, begin)
        addresses = (planes.codes, planes.scales, planes.factors)
        parts = [w.at(plane, offset) for plane, offset in zip(addresses, offsets, strict=True)]
        num_groups = w.b.udiv(num_columns, number(form.group))
        w.b.call(open_block, [*parts, num_groups, wide])
        is_first = w.b.icmp_signed("==", begin, number(0))

        def call(function: Value, row: Value) -> None:
            x = w.at(given["x"], w.b.mul(row, x_stride), w.times(begin, 4))
            to = w.at(out, w.b.mul(row, out_stride))
            w.b.call(function, [x, x_stride, wide, num_columns, to, out_stride, is_first])

        _by_counts(w, given["rows"], summed, call)
