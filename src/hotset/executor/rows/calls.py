"""Calling compiled functions one after another, without Python between them."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hotset.linear import native

FEWEST_IN_THREADS = 8  # rows of operations that are worth the start of threads
_ENTRY_BYTES = 24  # see `code.make_caller`


class Calls:
    """Functions and their arguments, in order. What arguments are addresses of has to stay."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, int]] = []
        self._arguments: list[npt.NDArray[np.int64]] = []
        self._list: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self, function: int, arguments: Sequence[int] | npt.NDArray[np.int64], threads_from: int
    ) -> None:
        """Append a call.

        Args:
            function: its address.
            arguments: begin with the rows and a counter; an array is used as it is, not copied.
            threads_from: from how many rows on all threads run it; 1 is always.
        """
        own = np.ascontiguousarray(arguments, dtype=np.int64)
        self._arguments.append(own)
        self._entries.append((function, own.ctypes.data, threads_from))
        self._list = None

    def run(self, num_rows: int, start: int = 0, stop: int | None = None) -> None:
        """Call those from `start` to before `stop` for some rows."""
        if self._list is None:
            self._list = np.array(self._entries, dtype=np.int64)
        count = (len(self) if stop is None else stop) - start
        call, parallel = _caller()
        num_threads = torch.get_num_threads() if parallel else 1
        at = self._list.ctypes.data + _ENTRY_BYTES * start
        call(at, count, num_rows, num_threads, parallel)


@functools.cache
def _caller() -> tuple[Callable[..., None], int]:
    """What calls a list of functions, and the address of what starts threads, 0 for none."""
    from hotset.executor.rows.code import make_caller  # needs the extra

    number, address = ctypes.c_int64, ctypes.c_void_p
    kind: Any = ctypes.CFUNCTYPE(None, address, number, number, number, number)
    start = native.parallel()
    parallel = 0 if start is None else ctypes.cast(start, address).value or 0
    return kind(native.compile_function(make_caller(), "call")), parallel
