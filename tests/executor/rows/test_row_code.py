"""Operations on rows: PyTorch's values, for views of any kind."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from hotset.executor.rows.calls import Calls
from hotset.executor.rows.nodes import Compute, View
from hotset.executor.rows.shapes import RowShape, compiled

pytest.importorskip("llvmlite", reason="the extra `cpu` is not installed")

NUM_ROWS = 9  # more than are worth threads

ONE_INPUT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": torch.clone,
    "neg": torch.neg,
    "cube": lambda x: x**3,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "cos": torch.cos,
    "sin": torch.sin,
}
TWO_INPUTS: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}


def run(compute: Compute, *rows: torch.Tensor) -> None:
    """Run an operation; its buffers are `[NUM_ROWS, width]` each, or `[width]` for all rows."""
    row_bytes = tuple(4 * row.stride(0) if row.dim() == 2 else 0 for row in rows)
    row_bytes = tuple(
        8 * row.stride(0) if row.dtype == torch.int64 else size
        for row, size in zip(rows, row_bytes, strict=True)
    )
    calls = Calls()
    addresses = [row.data_ptr() for row in rows]
    calls.add(compiled(RowShape((compute,), row_bytes, ())), [0, 0, *addresses, 0], 8)
    calls.run(NUM_ROWS)


def whole(buffer: int, size: int) -> View:
    return View(buffer, 0, (size,), (1,))


@pytest.mark.parametrize("size", [1, 16, 37])
@pytest.mark.parametrize("name", ONE_INPUT)
def test_an_operation_is_that_of_pytorch(name: str, size: int) -> None:
    x = torch.randn(NUM_ROWS, size) * 4
    x = x.abs() if name in ("sqrt", "rsqrt") else x
    x[0, 0] = torch.nan  # is not lost
    out = torch.empty_like(x)
    run(Compute(name, whole(1, size), (whole(0, size),)), x, out)
    torch.testing.assert_close(out, ONE_INPUT[name](x), rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.0, 0.0, 87.0, 200.0, 1e30])
def test_large_numbers_have_their_limits(value: float) -> None:
    x = torch.full((NUM_ROWS, 16), value)
    for name in ("sigmoid", "silu", "tanh", "gelu_tanh"):
        out = torch.empty_like(x)
        run(Compute(name, whole(1, 16), (whole(0, 16),)), x, out)
        torch.testing.assert_close(out, ONE_INPUT[name](x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", TWO_INPUTS)
def test_two_inputs_of_other_strides(name: str) -> None:
    """`[3, 1, 5]` by `[3, 4, 1]` of all rows, to a result that lies transposed; and by a number."""
    one, two = torch.randn(NUM_ROWS, 15), torch.randn(12)
    sizes = (3, 4, 5)
    views = (
        View(0, 0, (3, 1, 5), (5, 5, 1)).over(sizes),
        View(1, 0, (3, 4, 1), (4, 1, 1)).over(sizes),
    )
    out = torch.empty(NUM_ROWS, 60)
    run(Compute(name, View(2, 0, sizes, (1, 3, 12)), views), one, two, out)
    expected = TWO_INPUTS[name](one.view(-1, 3, 1, 5), two.view(3, 4, 1))
    assert torch.equal(out.view(-1, 5, 4, 3).transpose(1, 3), expected)
    run(Compute(name, View(1, 0, (15,), (1,)), (whole(0, 15), 3.5)), one, out)
    assert torch.equal(out[:, :15], TWO_INPUTS[name](one, 3.5))


@pytest.mark.parametrize("size", [1, 16, 37, 576])
def test_sums_are_of_the_last_dimension(size: int) -> None:
    x, out = torch.randn(NUM_ROWS, 3 * size), torch.empty(NUM_ROWS, 3)
    given = View(0, 0, (3, size), (size, 1))
    run(Compute("sum", View(1, 0, (3, 1), (1, 1)), (given,)), x, out)
    torch.testing.assert_close(out, x.view(-1, 3, size).sum(-1), rtol=1e-5, atol=1e-5)


def test_positions_become_floats_and_rows_may_lie_anywhere() -> None:
    positions = torch.arange(NUM_ROWS).unsqueeze(1) * 1000
    out = torch.empty(NUM_ROWS, 1)
    run(Compute("to_float", whole(1, 1), (whole(0, 1),)), positions, out)
    assert torch.equal(out, positions.float())

    places = torch.randperm(NUM_ROWS)
    pool, new = torch.zeros(NUM_ROWS, 20), torch.randn(NUM_ROWS, 20)
    copy = Compute("copy", whole(1, 20), (whole(0, 20),))
    shape = RowShape((copy,), (80, None), ())
    calls = Calls()
    in_bytes = (places * 80).numpy().astype(np.int64)
    addresses = [new.data_ptr(), pool.data_ptr(), in_bytes.ctypes.data]
    calls.add(compiled(shape), [0, 0, *addresses], 1)
    calls.run(NUM_ROWS)
    assert torch.equal(pool[places], new)
