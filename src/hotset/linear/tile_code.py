"""Products with narrow weights in tiles, in LLVM's language, compiled for the processor at hand.

PyTorch's own products for CPUs take 4 bits in bfloat16 only, and round each output to 8 bits: a
token would depend on how many rows share a step. A compiler of C is not on each machine; LLVM is a
package (`llvmlite`). The code is written once and compiled for AVX-512, AVX2 or NEON in under a
second.

For each output the sum goes over the columns in order, by fused multiply-adds in float32, whatever
the number of rows, tiles and threads: the same row gives the same bits in any step.

- Up to `FEW_ROWS` rows: codes are widened in registers and used there.
- More: `BLOCK_COLUMNS` columns of a tile are widened once, for all rows, into 32 KiB of the stack.

What is read next is asked for ahead of its use: a processor guesses it too late, as each tile is
short. Threads take a tile each, from a common counter, until none is left; three for a single row.
"""

from dataclasses import dataclass
from itertools import chain
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
from hotset.linear.tiles import TILE_ROWS, WORD_COLUMNS, TileFormat

# What a call gets, each 8 bytes; the counter is written. Those of `ADDRESSES` are such.
ARGUMENTS = ("rows", "counter", "x", "codes", "scales", "factors", "out", "columns", "tiles")
ADDRESSES = {"x", "codes", "scales", "factors", "out"}
FEW_ROWS = 16
BLOCK_COLUMNS = 256

_HALVES = ir.VectorType(ir.HalfType(), LANES)
_FLOATS_BYTES = 4 * LANES
_LINE_BYTES = 64  # that a processor fetches at once

Pair = list[Value]  # vectors of the lower and the upper half of a tile's rows


@dataclass(frozen=True, slots=True)
class _Planes:
    """Where the parts of a tile begin, and how far ahead what is read later: addresses, bytes."""

    codes: Value
    scales: Value
    factors: Value
    codes_ahead: Value
    scales_ahead: Value


@dataclass(frozen=True, slots=True)
class _Functions:
    """What a product consists of.

    Attributes:
        fused: by the number of rows, outputs of a tile, widened in registers.
        together: those of several tiles for one row.
        open_block: widens columns of a tile.
        summed: by the number of rows, adds the products with widened columns.
    """

    fused: dict[int, Value]
    together: Value
    open_block: Value
    summed: dict[int, Value]


def make_module(
    form: TileFormat, *, fused_rows: int, summed_rows: int, tiles_at_once: int
) -> ir.Module:
    """The function `product` for weights of one form.

    Args:
        form: of the weights.
        fused_rows: rows that are computed at once from codes, a power of 2. The processor should
            have registers for them: two for each row, and eight to widen.
        summed_rows: likewise from widened columns: two for each row, and three.
        tiles_at_once: tiles that are computed at once for a row that is alone: six for each.
    """
    module = ir.Module("hotset")
    functions = _Functions(
        {count: _fused(module, form, count, 1) for count in _powers(fused_rows)},
        _fused(module, form, 1, tiles_at_once),
        _open_block(module, form),
        {count: _summed(module, count) for count in _powers(summed_rows)},
    )
    _product(module, form, functions, tiles_at_once)
    return module


def _powers(most: int) -> list[int]:
    """Powers of 2 from 1 to `most`."""
    return [1 << i for i in range(most.bit_length())]


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
    w.prefetch(planes.scales, w.times(span, form.num_parts * TILE_ROWS * 2), planes.scales_ahead)
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


def _columns(
    w: Writer, form: TileFormat, planes: _Planes, first: Value, parts: list[Pair]
) -> list[Pair]:
    """The weights of columns that are stored together, a pair of vectors each."""
    begin = w.times(first, TILE_ROWS * form.code_bits // 8)
    for line in range(0, form.columns_together * TILE_ROWS * form.code_bits // 8, _LINE_BYTES):
        w.prefetch(planes.codes, begin, planes.codes_ahead, line)
    if form.code_bits == 4:
        words = [w.load(INTS, planes.codes, begin, half * _FLOATS_BYTES) for half in range(2)]
        columns = [[w.field(word, 4 * place, 4) for word in words] for place in range(WORD_COLUMNS)]
        codes = [[w.b.uitofp(code, FLOATS) for code in pair] for pair in columns]
    else:
        stored = [w.load(BYTES, planes.codes, begin, half * LANES) for half in range(2)]
        codes = [[w.b.sitofp(w.b.sext(code, INTS), FLOATS) for code in stored]]
    return [_weights(w, form, pair, parts) for pair in codes]


def _weights(w: Writer, form: TileFormat, codes: Pair, parts: list[Pair]) -> Pair:
    """Of a column's codes, as floats."""
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


def _fused(module: ir.Module, form: TileFormat, count: int, num_tiles: int) -> Value:
    """Outputs of `count` rows for some tiles, widening in registers. Strides are in bytes.

    Planes of tiles lie one behind another. A row's sum waits for itself in each column: sums of
    several tiles are added to meanwhile.
    """
    kinds = [ADDRESS, I64, ADDRESS, ADDRESS, ADDRESS, I64, ADDRESS, I64]
    w = Writer(module, f"fused_{count}_{num_tiles}", kinds)
    w.function.linkage = "internal"
    x, x_stride, *addresses, num_groups, out, out_stride = w.arguments
    tile_bytes = _column_bytes(w, form, w.times(num_groups, form.group))
    ahead = [w.times(size, num_tiles) for size in tile_bytes[:2]]  # the same of the next tiles
    tiles = [
        _Planes(
            *(
                w.at(address, w.times(size, tile))
                for address, size in zip(addresses, tile_bytes, strict=True)
            ),
            *ahead,
        )
        for tile in range(num_tiles)
    ]
    inputs = _row_addresses(w, x, x_stride, count)
    width = 2 * count
    sums = [ZEROS] * (width * num_tiles)
    with w.loop(number(0), num_groups, 1, sums) as (group, group_sums):
        parts = [_group(w, form, planes, group) for planes in tiles]
        begin = w.times(group, form.group)
        step = form.columns_together
        with w.loop(number(0), number(form.group), step, group_sums) as (offset, sums):
            first = w.b.add(begin, offset)
            columns = [
                _columns(w, form, planes, first, own)
                for planes, own in zip(tiles, parts, strict=True)
            ]
            for place in range(step):
                column = w.b.add(first, number(place))
                for tile in range(num_tiles):
                    own = sums[tile * width : (tile + 1) * width]
                    _add_products(w, own, columns[tile][place], inputs, column)
                    sums[tile * width : (tile + 1) * width] = own
        group_sums[:] = sums
    for tile in range(num_tiles):
        own = group_sums[tile * width : (tile + 1) * width]
        to = w.at(out, tile * 4 * TILE_ROWS)
        _store_sums(w, own, _row_addresses(w, to, out_stride, count))
    return w.end()


def _open_block(module: ir.Module, form: TileFormat) -> Value:
    """Some groups of a tile to float32 `[columns, 32]`."""
    kinds = [ADDRESS, ADDRESS, ADDRESS, I64, ADDRESS]
    w = Writer(module, "open_block", kinds)
    w.function.linkage = "internal"
    codes, scales, factors, num_groups, wide = w.arguments
    ahead = _column_bytes(w, form, number(BLOCK_COLUMNS))[:2]
    planes = _Planes(codes, scales, factors, *ahead)
    with w.loop(number(0), num_groups, 1, []) as (group, _):
        parts = _group(w, form, planes, group)
        begin = w.times(group, form.group)
        with w.loop(number(0), number(form.group), form.columns_together, []) as (offset, _):
            first = w.b.add(begin, offset)
            to = w.at(wide, w.times(first, 2 * _FLOATS_BYTES))
            columns = _columns(w, form, planes, first, parts)
            for place, vector in enumerate(chain.from_iterable(columns)):
                w.store(vector, to, place * _FLOATS_BYTES)
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
    module: ir.Module, form: TileFormat, functions: _Functions, tiles_at_once: int
) -> None:
    """`product(address of the arguments)`: tiles from the counter until none is left.

    A row that is alone takes `tiles_at_once`, where there are as many.
    """
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
    is_alone = w.b.icmp_signed("==", given["rows"], number(1))
    unit = w.b.select(is_alone, number(tiles_at_once), number(1))
    head, body, after = (w.function.append_basic_block() for _ in range(3))
    w.b.branch(head)
    w.b.position_at_end(head)
    begin = w.b.atomic_rmw("add", counter, unit, "monotonic")
    w.b.cbranch(w.b.icmp_signed("<", begin, given["tiles"]), body, after)
    w.b.position_at_end(body)
    end = w.b.add(begin, unit)
    is_whole = w.b.icmp_signed("<=", end, given["tiles"])
    with w.b.if_else(w.b.and_(is_alone, is_whole)) as (together, apart):
        with together:
            planes = _tile_planes(w, form, given, begin)
            _few_rows(w, form, given, planes, begin, {1: functions.together})
        with apart:
            stop = w.b.select(is_whole, end, given["tiles"])
            with w.loop(begin, stop, 1, []) as (tile, _):
                _tile(w, form, given, tile, wide, functions)
    w.b.branch(head)
    w.b.position_at_end(after)
    w.end()


def _tile(
    w: Writer,
    form: TileFormat,
    given: dict[str, Value],
    tile: Value,
    wide: Value,
    functions: _Functions,
) -> None:
    """All rows of one tile."""
    planes = _tile_planes(w, form, given, tile)
    is_few = w.b.icmp_signed("<=", given["rows"], number(FEW_ROWS))
    with w.b.if_else(is_few) as (few, many):
        with few:
            _few_rows(w, form, given, planes, tile, functions.fused)
        with many:
            _many_rows(w, form, given, planes, tile, wide, functions)


def _tile_planes(w: Writer, form: TileFormat, given: dict[str, Value], tile: Value) -> list[Value]:
    """Where a tile's codes, scales and factors begin."""
    sizes = _column_bytes(w, form, given["columns"])
    return [
        w.at(given[name], w.b.mul(tile, size))
        for name, size in zip(("codes", "scales", "factors"), sizes, strict=True)
    ]


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
    planes: list[Value],
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
        w.b.call(function, [x, x_stride, *planes, num_groups, to, out_stride])

    _by_counts(w, given["rows"], fused, call)


def _many_rows(
    w: Writer,
    form: TileFormat,
    given: dict[str, Value],
    planes: list[Value],
    tile: Value,
    wide: Value,
    functions: _Functions,
) -> None:
    x_stride = w.times(given["columns"], 4)
    out_stride = w.times(given["tiles"], 4 * TILE_ROWS)
    out = w.at(given["out"], w.times(tile, 4 * TILE_ROWS))
    with w.loop(number(0), given["columns"], BLOCK_COLUMNS, []) as (begin, _):
        left = w.b.sub(given["columns"], begin)
        is_last = w.b.icmp_signed("<", left, number(BLOCK_COLUMNS))
        num_columns = w.b.select(is_last, left, number(BLOCK_COLUMNS))
        offsets = _column_bytes(w, form, begin)
        parts = [w.at(plane, offset) for plane, offset in zip(planes, offsets, strict=True)]
        num_groups = w.b.udiv(num_columns, number(form.group))
        w.b.call(functions.open_block, [*parts, num_groups, wide])
        is_first = w.b.icmp_signed("==", begin, number(0))

        def call(function: Value, row: Value) -> None:
            x = w.at(given["x"], w.b.mul(row, x_stride), w.times(begin, 4))
            to = w.at(out, w.b.mul(row, out_stride))
            w.b.call(function, [x, x_stride, wide, num_columns, to, out_stride, is_first])

        _by_counts(w, given["rows"], functions.summed, call)
