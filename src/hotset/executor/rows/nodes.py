"""What a model computes for one token: numbers in buffers, and what is done with them in order."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from hotset.linear.tiles import Tiles


@dataclass(frozen=True, slots=True)
class View:
    """Numbers of a buffer, as a tensor has them in its storage.

    Attributes:
        buffer: which.
        offset: of the first number.
        sizes: by dimension.
        strides: in numbers; 0 where one stands for all.
    """

    buffer: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def over(self, sizes: tuple[int, ...]) -> "View":
        """The view as one of `sizes`, which its own broadcast to."""
        missing = len(sizes) - len(self.sizes)
        strides = (0,) * missing + tuple(
            0 if size == 1 else stride
            for size, stride in zip(self.sizes, self.strides, strict=True)
        )
        return View(self.buffer, self.offset, sizes, strides)


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory for one token.

    Attributes:
        width: its float32 numbers.
        constant: a tensor of the model whose storage it is, the same for all tokens; None of what
            a step computes.
    """

    width: int
    constant: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Compute:
    """An operation of `code.OPERATIONS`, number by number.

    Attributes:
        out: written; `sum` adds over the last dimension, of which `out` has one number.
        inputs: views of the sizes that are gone through, or numbers.
    """

    operation: str
    out: View
    inputs: tuple[View | float, ...]


@dataclass(frozen=True, slots=True)
class Embed:
    """What a module makes of a token's id, or of its position.

    Attributes:
        of_positions: which of the two.
        out: buffer of what it returns.
    """

    module: nn.Module
    of_positions: bool
    out: int


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A narrow weight times the numbers of buffer `x`, to buffer `out`, with those that pad it."""

    tiles: Tiles
    x: int
    out: int


@dataclass(frozen=True, slots=True)
class Attend:
    """Store a layer's key and value `[H_kv, 1, D]` and attend, from `[H, 1, D]` to `[1, H, D_v]`.

    Attributes:
        out: buffer of the result.
    """

    layer: int
    query: View
    key: View
    value: View
    out: int


Node: TypeAlias = Compute | Embed | Product | Attend


@dataclass(frozen=True, slots=True)
class Trace:
    """All that a model computes for one token, in order.

    Attributes:
        positions: buffer of the position, an int64; None where none is computed with.
        logits: `[1, 1, V]`.
    """

    buffers: list[Buffer]
    nodes: list[Node]
    positions: int | None
    logits: View
