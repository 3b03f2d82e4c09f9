"""What a function for rows is compiled for."""

import functools
from dataclasses import dataclass

from hotset.executor.rows.nodes import Compute
from hotset.linear import native

# What a call gets, each 8 bytes: the rows, a counter that is written, and from here on an address
# for each buffer, then that of the places of rows.
FIRST_ADDRESS = 2


@dataclass(frozen=True, slots=True)
class RowShape:
    """A function's operations. Buffers are numbered as their addresses are given.

    Attributes:
        computes: in order.
        row_bytes: of each buffer that is given: from a row to the next, 0 where all rows have the
            same; None where the row's number in the list of places says how many bytes behind the
            address its numbers are.
        scratch: float32 numbers of each further buffer, of which a thread has its own.
    """

    computes: tuple[Compute, ...]
    row_bytes: tuple[int | None, ...]
    scratch: tuple[int, ...]


@functools.cache
def compiled(shape: RowShape) -> int:
    """The address of the function for a shape. Raises whatever LLVM does."""
    from hotset.executor.rows.code import make_module  # needs the extra

    return native.compile_function(make_module(shape), "rows")
