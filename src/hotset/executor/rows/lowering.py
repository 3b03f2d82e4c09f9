"""PyTorch's operations as those of compiled code (`code.OPERATIONS`)."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch


class Recorder(Protocol):
    """What notes operations; see `trace`."""

    def compute(
        self, operation: str, out: torch.Tensor, *inputs: torch.Tensor | float, over: Any = None
    ) -> None:
        """Note an operation."""
        ...

    def refuse(self, what: str) -> None:
        """Say that there is no such operation here."""
        ...


# Recorder, result, arguments by place and by name.
Lower: TypeAlias = Callable[[Recorder, torch.Tensor, tuple[Any, ...], dict[str, Any]], None]


def _same(operation: str, num_inputs: int) -> Lower:
    def lower(r: Recorder, out: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        if len(args) > num_inputs or kwargs:  # `alpha`, `rounding_mode` and the like
            r.refuse(f"{operation} with {args[num_inputs:]} {kwargs}")
        r.compute(operation, out, *args)

    return lower


def _copy(r: Recorder, out: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
    source = args[0]
    r.compute("copy" if source.dtype == out.dtype else "to_float", out, source)


def _power(r: Recorder, out: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
    x, exponent = args
    if exponent == 2:
        r.compute("mul", out, x, x)
    elif exponent == 3:
        r.compute("cube", out, x)
    elif exponent == 0.5:
        r.compute("sqrt", out, x)
    elif exponent == -0.5:
        r.compute("rsqrt", out, x)
    else:
        r.refuse(f"a power of {exponent}")


def _mean(r: Recorder, out: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
    x, dims = args[0], args[1] if len(args) > 1 else None
    if list(dims or []) not in ([-1], [x.dim() - 1]) or kwargs:
        r.refuse(f"a mean over {dims} {kwargs}")
    r.compute("sum", out, x, over=x.shape)
    r.compute("div", out, out, float(x.shape[-1]))


def _cat(r: Recorder, out: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    start = 0
    for part in tensors:
        r.compute("copy", out.narrow(dim, start, part.shape[dim]), part)
        start += part.shape[dim]


def _gelu(r: Recorder, out: torch.Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
    is_tanh = kwargs.get("approximate", "none") == "tanh"
    r.compute("gelu_tanh" if is_tanh else "gelu", out, args[0])


# By the name in PyTorch, of operations in place too.
LOWERED: dict[str, Lower] = {
    **{name: _same(name, 2) for name in ("add", "sub", "mul", "div")},
    **{
        name: _same(name, 1)
        for name in ("neg", "rsqrt", "sqrt", "silu", "sigmoid", "tanh", "relu", "cos", "sin", "exp")
    },
    "clone": _copy,
    "copy": lambda r, out, args, kwargs: _copy(r, out, args[1:], kwargs),
    "_to_copy": _copy,
    "pow": _power,
    "mean": _mean,
    "cat": _cat,
    "gelu": _gelu,
}
