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
FLOATS = ir.VectorType(FLOAT, LANES)
ZEROS = ir.Constant(FLOATS, [0.0] * LANES)

Value = Any  # of llvmlite, which has no types


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
        """`x * y + z` of vectors, rounded once."""
        return self.intrinsic(f"llvm.fma.v{LANES}f32", FLOATS, [x, y, z])

    def intrinsic(
        self, name: str, result: Any, arguments: list[Value], *, fastmath: tuple[str, ...] = ()
    ) -> Value:
        """What LLVM calls by `name`."""
        kinds = [argument.type for argument in arguments]
        function = self._module.globals.get(name) or ir.Function(
            self._module, ir.FunctionType(result, kinds), name
        )
        return self.b.call(function, arguments, fastmath=fastmath)

    def spread(self, value: Value) -> Value:
        """A vector with a float in each lane."""
        none = ir.Constant(FLOATS, ir.Undefined)
        first = self.b.insert_element(none, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, none, ir.Constant(INTS, [0] * LANES))

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
