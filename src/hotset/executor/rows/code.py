"""What is between two products, for one row after another, in LLVM's language.

Each operation is a loop over its numbers, which lie in the processor's nearest cache from one to
the next. Threads take a row each, from a common counter, until none is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from hotset.executor.rows.nodes import Compute, View
from hotset.executor.rows.shapes import FIRST_ADDRESS, RowShape
from hotset.linear.native_code import (
    ADDRESS,
    FLOAT,
    FLOATS,
    I32,
    I64,
    LANES,
    VOID,
    ZEROS,
    Value,
    Writer,
    number,
)

_GELU = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the factor of the cube


def make_module(shape: RowShape) -> ir.Module:
    """The function `rows`."""
    module = ir.Module("hotset")
    w = Writer(module, "rows", [ADDRESS])
    (arguments,) = w.arguments
    num_rows, counter = w.load(I64, arguments), w.at(arguments, 8)
    given = [
        w.load(ADDRESS, arguments, 8 * (FIRST_ADDRESS + i)) for i in range(len(shape.row_bytes) + 1)
    ]
    scratch = [_scratch(w, width) for width in shape.scratch]
    head, body, after = (w.function.append_basic_block() for _ in range(3))
    w.b.branch(head)
    w.b.position_at_end(head)
    row = w.b.atomic_rmw("add", counter, number(1), "monotonic")
    w.b.cbranch(w.b.icmp_signed("<", row, num_rows), body, after)
    w.b.position_at_end(body)
    buffers = [
        w.at(address, w.load(I64, given[-1], w.times(row, 8)))
        if stride is None
        else w.at(address, w.times(row, stride))
        for address, stride in zip(given, shape.row_bytes, strict=False)
    ]
    for compute in shape.computes:
        _Loops(w, compute, [*buffers, *scratch]).write()
    w.b.branch(head)
    w.b.position_at_end(after)
    w.end()
    return module


def _scratch(w: Writer, width: int) -> Value:
    memory = w.b.alloca(ir.ArrayType(FLOAT, width))
    memory.align = 64
    # An address of any type: llvmlite keeps what memory on the stack was made for.
    return w.b.inttoptr(w.b.ptrtoint(memory, I64), ADDRESS)


@dataclass(frozen=True, slots=True)
class _Operand:
    """Where the numbers of a view are: an address, and bytes from one to the next by dimension."""

    address: Value
    strides: list[int]


class _Loops:
    """Writes the loops of one operation."""

    def __init__(self, w: Writer, compute: Compute, buffers: list[Value]) -> None:
        self.w, self.operation = w, compute.operation
        self.item_bytes = 8 if compute.operation == "to_float" else 4
        views = [view for view in compute.inputs if isinstance(view, View)]
        sizes, out = views[0].sizes, compute.out
        if self.operation == "sum":  # one number for all of the last dimension
            out = View(out.buffer, out.offset, sizes, (*out.strides[: len(sizes) - 1], 0))
            self.operation = "sum" if sizes[-1] > 1 else "copy"
        kept = _kept_dimensions(sizes, [out, *views])
        self.sizes = [size for size, _ in kept]
        self.out = self._operand(out, kept, 0, 4, buffers)
        self.inputs: list[_Operand | float] = []
        place = 1
        for given in compute.inputs:
            if isinstance(given, View):
                operand = self._operand(given, kept, place, self.item_bytes, buffers)
                self.inputs.append(operand)
                place += 1
            else:
                self.inputs.append(given)

    def _operand(
        self,
        view: View,
        kept: list[tuple[int, list[int]]],
        place: int,
        item_bytes: int,
        buffers: list[Value],
    ) -> _Operand:
        address = self.w.at(buffers[view.buffer], view.offset * item_bytes)
        return _Operand(address, [strides[place] * item_bytes for _, strides in kept])

    def write(self) -> None:
        """All loops, the outer ones first."""
        self._nest(0, [])

    def _nest(self, dimension: int, indices: list[Value]) -> None:
        if dimension < len(self.sizes) - 1:
            with self.w.loop(number(0), number(self.sizes[dimension]), 1, []) as (index, _):
                self._nest(dimension + 1, [*indices, index])
            return
        out, *inputs = (self._begin(operand, indices) for operand in (self.out, *self.inputs))
        size = self.sizes[-1]
        operands = [self.out, *(each for each in self.inputs if isinstance(each, _Operand))]
        steps = {operand.strides[-1] for operand in operands}
        can_be_wide = steps <= {0, 4} and self.operation not in _ONE_BY_ONE
        wide = size - size % LANES if can_be_wide else 0
        if self.operation == "sum":
            self._add_up(out, inputs[0], wide, size)
        else:
            self._each(out, inputs, 0, wide, LANES)
            self._each(out, inputs, wide, size, 1)

    def _begin(self, operand: _Operand | float, indices: list[Value]) -> Value:
        """Where the numbers of the innermost loop begin."""
        if not isinstance(operand, _Operand):
            return None
        w, address = self.w, operand.address
        for index, stride in zip(indices, operand.strides, strict=False):
            address = w.at(address, w.times(index, stride))
        return address

    def _each(self, out: Value, inputs: list[Value], start: int, stop: int, step: int) -> None:
        if start == stop:
            return
        w, operation = self.w, _OPERATIONS[self.operation]
        with w.loop(number(start), number(stop), step, []) as (index, _):
            values = [
                self._load(operand, address, index, step)
                for operand, address in zip(self.inputs, inputs, strict=True)
            ]
            to = w.at(out, w.times(index, self.out.strides[-1]))
            w.store(operation(w, *values), to)

    def _load(self, operand: _Operand | float, address: Value, index: Value, step: int) -> Value:
        w = self.w
        if not isinstance(operand, _Operand):
            return ir.Constant(FLOAT, operand) if step == 1 else _constant(FLOATS, operand)
        stride = operand.strides[-1]
        if self.item_bytes == 8:
            return w.load(I64, address, w.times(index, stride))
        if step == 1 or not stride:
            value = w.load(FLOAT, address, w.times(index, stride))
            return value if step == 1 else w.spread(value)
        return w.load(FLOATS, address, w.times(index, stride))

    def _add_up(self, out: Value, x: Value, wide: int, size: int) -> None:
        w = self.w
        (operand,) = self.inputs
        with w.loop(number(0), number(wide), LANES, [ZEROS]) as (index, sums):
            sums[0] = w.b.fadd(sums[0], self._load(operand, x, index, LANES))
        total = w.sum(sums[0])
        with w.loop(number(wide), number(size), 1, [total]) as (index, totals):
            totals[0] = w.b.fadd(totals[0], self._load(operand, x, index, 1))
        w.store(totals[0], out)


def _kept_dimensions(sizes: tuple[int, ...], views: list[View]) -> list[tuple[int, list[int]]]:
    """Size, and stride of each view, of dimensions of more than one number, merged where they can.

    At least one.
    """
    kept: list[tuple[int, list[int]]] = []
    for dimension, size in enumerate(sizes):
        strides = [view.strides[dimension] for view in views]
        if size == 1:
            continue
        if kept and all(
            outer == inner * size for outer, inner in zip(kept[-1][1], strides, strict=True)
        ):
            kept[-1] = (kept[-1][0] * size, strides)
        else:
            kept.append((size, strides))
    return kept or [(1, [0] * len(views))]


def _constant(kind: Any, value: float) -> Value:
    return ir.Constant(kind, [value] * LANES if kind == FLOATS else value)


def _sigmoid(w: Writer, x: Value) -> Value:
    one = _constant(x.type, 1.0)
    return w.b.fdiv(one, w.b.fadd(one, w.exp(w.b.fneg(x))))


def _tanh(w: Writer, x: Value) -> Value:
    """To 2e-7: 2 / (1 + e**(-2 x)) - 1."""
    two, one = _constant(x.type, 2.0), _constant(x.type, 1.0)
    return w.b.fsub(w.b.fmul(two, _sigmoid(w, w.b.fmul(two, x))), one)


def _cube(w: Writer, x: Value) -> Value:
    return w.b.fmul(w.b.fmul(x, x), x)


def _gelu_tanh(w: Writer, x: Value) -> Value:
    b = w.b
    factor, of_cube = (_constant(x.type, value) for value in _GELU)
    inner = b.fmul(factor, b.fadd(x, b.fmul(of_cube, _cube(w, x))))
    return b.fmul(x, _sigmoid(w, b.fmul(_constant(x.type, 2.0), inner)))


def _gelu(w: Writer, x: Value) -> Value:
    b = w.b
    erf = w.external("erff", [b.fmul(x, ir.Constant(FLOAT, 0.5**0.5))])
    half = b.fmul(x, ir.Constant(FLOAT, 0.5))
    return b.fmul(half, b.fadd(ir.Constant(FLOAT, 1.0), erf))


def _relu(w: Writer, x: Value) -> Value:
    zero = _constant(x.type, 0.0)
    return w.b.select(w.b.fcmp_ordered("<", x, zero), zero, x)  # NaN stays


def _rsqrt(w: Writer, x: Value) -> Value:
    return w.b.fdiv(_constant(x.type, 1.0), w.sqrt(x))


_OPERATIONS: dict[str, Callable[..., Value]] = {
    "copy": lambda w, x: x,
    "to_float": lambda w, x: w.b.sitofp(x, FLOAT),
    "add": lambda w, x, y: w.b.fadd(x, y),
    "sub": lambda w, x, y: w.b.fsub(x, y),
    "mul": lambda w, x, y: w.b.fmul(x, y),
    "div": lambda w, x, y: w.b.fdiv(x, y),
    "neg": lambda w, x: w.b.fneg(x),
    "cube": _cube,
    "sqrt": lambda w, x: w.sqrt(x),
    "rsqrt": _rsqrt,
    "exp": lambda w, x: w.exp(x),
    "sigmoid": _sigmoid,
    "silu": lambda w, x: w.b.fmul(x, _sigmoid(w, x)),
    "tanh": _tanh,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "cos": lambda w, x: w.external("cosf", [x]),
    "sin": lambda w, x: w.external("sinf", [x]),
}
# By the C library's functions, which take one number, or of 8 bytes.
_ONE_BY_ONE = {"cos", "sin", "gelu", "to_float"}
OPERATIONS = frozenset({*_OPERATIONS, "sum"})


def make_caller() -> ir.Module:
    """The function `call`: calls functions one after another, in threads or not.

    Its arguments: the address of a list of functions; how many; rows; threads; and OpenMP's
    `GOMP_parallel`, which more than one thread needs. An entry of the list is three numbers of 8
    bytes: a function, its arguments, and from how many rows on all threads run it. Arguments begin
    with the rows and a counter, which are set before each call.
    """
    module = ir.Module("hotset")
    w = Writer(module, "call", [ADDRESS, I64, I64, I64, I64])
    entries, count, rows, num_threads, parallel = w.arguments
    kind = ir.FunctionType(VOID, [ADDRESS])
    parallel_kind = ir.FunctionType(VOID, [ADDRESS, ADDRESS, I32, I32])
    has_threads = w.b.icmp_signed(">", num_threads, number(1))
    with w.loop(number(0), count, 1, []) as (index, _):
        entry = w.at(entries, w.times(index, 24))
        function, arguments = w.load(I64, entry), w.load(ADDRESS, entry, 8)
        w.b.store(rows, arguments, align=8)
        w.b.store(number(0), w.at(arguments, 8), align=8)
        is_many = w.b.icmp_signed(">=", rows, w.load(I64, entry, 16))
        with w.b.if_else(w.b.and_(has_threads, is_many)) as (several, one):
            with several:
                start = w.b.inttoptr(parallel, ir.PointerType(parallel_kind))
                threads = w.b.trunc(num_threads, I32)
                address = w.b.inttoptr(function, ADDRESS)
                w.b.call(start, [address, arguments, threads, ir.Constant(I32, 0)])
            with one:
                w.b.call(w.b.inttoptr(function, ir.PointerType(kind)), [arguments])
    w.end()
    return module
