"""Writing functions in LLVM's language: vectors of 16 float32, loops, and what they carry."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

LANES = 16
I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
FLOAT, VOID, ADDRESS = ir.FloatType(), ir.VoidType(), ir.PointerType()
BYTES = ir.VectorType(I8, LANES)
INTS = ir.VectorType(I32, LANES)
LONGS = ir.VectorType(I64, LANES)
FLOATS = ir.VectorType(FLOAT, LANES)
ZEROS = ir.Constant(FLOATS, [0.0] * LANES)

Value = Any  # of llvmlite, which has no types

# e**x is 2**(x / ln 2): of the fraction, which is from -1/2 to 1/2, by Taylor's series. Results
# from 1e-38 to 1e38.
_LEAST, _MOST = -87.0, 88.0
_SERIES = (
    1.540353e-4, 1.333355815e-3, 9.618129108e-3, 5.550410866e-2, 2.402265070e-1, 6.931471806e-1,
)  # fmt: skip
_ROUNDER = 1.5 * 2**23  # added to a small float, its last bits are the nearest whole number
_REASSOCIATED = ("reassoc",)  # sums of a vector's lanes, in an order that is fixed when compiled


def number(value: int) -> Value:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


class Writer:
    """Writes one function; `b` is llvmlite's builder at its end."""

    def __init__(self, module: ir.Module, name: str, types: list[Any]) -> None:
        self.function = ir.Function(module, ir.FunctionType(VOID, types), name)
        self.arguments = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block())
        self._module = module

    def at(self, address: Value, *offsets: Value | int) -> Value:
        """`address` and the sum of `offsets`, in bytes."""
        for offset in offsets:
            value = number(offset) if isinstance(offset, int) else offset
            address = self.b.gep(address, [value], source_etype=I8)
        return address

    def times(self, value: Value, factor: int) -> Value:
        """A number of 64 bits, multiplied."""
        return self.b.mul(value, number(factor))

    def load(self, kind: Any, address: Value, *offsets: Value | int) -> Value:
        """A value of a kind that may lie anywhere."""
        return self.b.load(self.at(address, *offsets), align=1, typ=kind)

    def store(self, value: Value, address: Value, *offsets: Value | int) -> None:
        """Floats to where floats are."""
        self.b.store(value, self.at(address, *offsets), align=4)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """`x * y + z`, of vectors or of floats, rounded once."""
        return self.intrinsic(f"llvm.fma.{_suffix(x)}", x.type, [x, y, z])

    def sqrt(self, x: Value) -> Value:
        """Of a vector or a float."""
        return self.intrinsic(f"llvm.sqrt.{_suffix(x)}", x.type, [x])

    def exp(self, x: Value) -> Value:
        """The exponential of a vector or a float, to 2e-7 of it, from 1e-38 to 1e38; NaN of NaN."""
        b = self.b
        kind, ints = x.type, INTS if x.type == FLOATS else I32

        def constant(value: float) -> Value:
            return ir.Constant(kind, [value] * LANES if kind == FLOATS else value)

        least, most = constant(_LEAST), constant(_MOST)
        x = b.select(b.fcmp_ordered("<", x, least), least, x)
        x = b.select(b.fcmp_ordered(">", x, most), most, x)
        scaled = b.fmul(x, constant(1.4426950408889634))
        rounded = b.fadd(scaled, constant(_ROUNDER))
        fraction = b.fsub(scaled, b.fsub(rounded, constant(_ROUNDER)))
        power = constant(_SERIES[0])
        for term in (*_SERIES[1:], 1.0):
            power = self.fma(power, fraction, constant(term))
        shift = ir.Constant(ints, [23] * LANES if kind == FLOATS else 23)
        exponent = b.shl(b.bitcast(rounded, ints), shift)
        value = b.bitcast(b.add(b.bitcast(power, ints), exponent), kind)
        return b.fadd(value, b.fsub(x, x))  # the bits of a NaN are not kept by whole numbers

    def sum(self, vector: Value) -> Value:
        """Of a vector's lanes."""
        return self.intrinsic(
            f"llvm.vector.reduce.fadd.v{LANES}f32",
            FLOAT,
            [ir.Constant(FLOAT, 0.0), vector],
            fastmath=_REASSOCIATED,
        )

    def external(self, name: str, arguments: list[Value]) -> Value:
        """What a function of the C library makes of floats."""
        return self.intrinsic(name, FLOAT, arguments)

    def intrinsic(
        self, name: str, result: Any, arguments: list[Value], *, fastmath: tuple[str, ...] = ()
    ) -> Value:
        """What LLVM calls by `name`."""
        kinds = [argument.type for argument in arguments]
        function = self._module.globals.get(name) or ir.Function(
            self._module, ir.FunctionType(result, kinds), name
        )
        return self.b.call(function, arguments, fastmath=fastmath)

    def prefetch(self, address: Value, *offsets: Value | int) -> None:
        """Have the processor bring what is there nearer; any address will do."""
        kinds = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, to stay, data
        self.intrinsic("llvm.prefetch.p0", VOID, [self.at(address, *offsets), *kinds])

    def field(self, words: Value, first: int, count: int) -> Value:
        """Bits of a vector of words: `count` from the bit `first` on."""
        moved = self.b.lshr(words, ir.Constant(INTS, [first] * LANES)) if first else words
        mask = (1 << count) - 1
        return self.b.and_(moved, ir.Constant(INTS, [mask] * LANES))

    def spread(self, value: Value) -> Value:
        """A vector with a number in each lane."""
        none = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
        first = self.b.insert_element(none, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, none, ir.Constant(INTS, [0] * LANES))

    def folded(self, one: Value, other: Value, period: int) -> Value:
        """Sums of lanes `period` apart: of the first vector where lane // period is even.

        Of vectors whose lanes i, i + 2 * period, ... are to be added, `LANES / 2 / period` times.
        """
        lanes = [i % period + i // (2 * period) * 2 * period for i in range(LANES)]
        odd = [lane + LANES if i // period % 2 else lane for i, lane in enumerate(lanes)]
        left, right = odd, [lane + period for lane in odd]
        masks = (ir.Constant(INTS, mask) for mask in (left, right))
        return self.b.fadd(*(self.b.shuffle_vector(one, other, mask) for mask in masks))

    @contextmanager
    def loop(
        self, start: Value, stop: Value, step: int, carried: list[Value]
    ) -> Iterator[tuple[Value, list[Value]]]:
        """For each index: yields it and the carried values, which the body replaces in place.

        After the loop the list holds what they are then.
        """
        b, before = self.b, self.b.block
        head, body, after = (self.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        index, phis = b.phi(I64), [b.phi(value.type) for value in carried]
        b.cbranch(b.icmp_signed("<", index, stop), body, after)
        b.position_at_end(body)
        values = list(phis)
        yield index, values
        following = b.add(index, number(step))
        pairs = [(index, start, following), *zip(phis, carried, values, strict=True)]
        for phi, first, later in pairs:
            phi.add_incoming(first, before)
            phi.add_incoming(later, b.block)
        b.branch(head)
        b.position_at_end(after)
        values[:] = phis

    def end(self) -> Value:
        """Return from the function; it."""
        self.b.ret_void()
        return self.function


def _suffix(value: Value) -> str:
    """How the name of an intrinsic ends, for the type of `value`."""
    return f"v{LANES}f32" if value.type == FLOATS else "f32"
