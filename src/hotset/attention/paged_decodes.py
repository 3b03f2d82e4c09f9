"""Attention of the decodes of a step over paged float32 KV on a CPU, compiled at first use."""

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hotset.attention.batch import SequenceSpan
from hotset.linear import native

# What a call gets, each 8 bytes: those of the step, then those of a layer. The counter is written,
# `scaling` is the address of a float32 as others of `ADDRESSES` are, strides are in bytes.
ADDRESSES = {
    "rows", "tables", "starts", "ends", "query", "keys", "values", "out", "scaling",
}  # fmt: skip
ARGUMENTS = (
    "num_sequences", "counter", "rows", "tables", "starts", "ends", "width",
    "query", "keys", "values", "out", "scaling", "num_heads", "query_head", "query_row", "block",
    "token", "head", "out_row", "out_head",
)  # fmt: skip
_MULTIPLE = 16  # numbers of a vector
_CHECK_BOUND = 1e-5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PagedShape:
    """What code is compiled for.

    Attributes:
        group: query heads that share a KV head.
        key_dim: a multiple of 16.
        value_dim: likewise.
        block_size: tokens of a block, likewise.
    """

    group: int
    key_dim: int
    value_dim: int
    block_size: int


class PagedDecodes:
    """Sequences of one query each, and where their keys are.

    Args:
        sequences: of one token each.
        window: tokens that a query sees, its own last; None is all.
        block_size: tokens of a block.

    Attributes:
        rows: `[R]` int64, rows of the flat batch.
    """

    def __init__(
        self, sequences: Sequence[SequenceSpan], window: int | None, block_size: int
    ) -> None:
        firsts, tables = zip(*(s.visible(window, block_size) for s in sequences), strict=True)
        self._width = max(len(table) for table in tables)
        self._tables = torch.tensor([t + [0] * (self._width - len(t)) for t in tables])
        # From the first position of a table on.
        self._starts = torch.tensor(firsts) % block_size
        unseen = torch.tensor(firsts) - self._starts
        self._ends = torch.tensor([s.context_len for s in sequences]) - unseen
        self.rows = torch.tensor([s.start for s in sequences])

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scaling: float,
    ) -> None:
        """Write the outputs of the sequences into their rows.

        Args:
            query: `[H, T, D]`, numbers of a head next to each other.
            keys: `[N, block_size, H_kv, >= D]`, as `values` but for its place.
            values: `[N, block_size, H_kv, >= D_v]`.
            output: `[T, H, D_v]`, written.
            scaling: factor on the scores.
        """
        factor = ctypes.c_float(scaling)
        given = self.arguments() + layer_arguments(query, keys, values, output, factor)
        shape = shape_of(query, keys, output.shape[-1])
        native.run(compiled(shape), (ctypes.c_int64 * len(given))(*given))

    def arguments(self) -> list[int]:
        """The first of `ARGUMENTS`, good as long as this is there."""
        tensors = (self.rows, self._tables, self._starts, self._ends)
        return [len(self.rows), 0, *(tensor.data_ptr() for tensor in tensors), self._width]


def layer_arguments(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scaling: ctypes.c_float,
) -> list[int]:
    """The rest of `ARGUMENTS`; see `PagedDecodes.attend`."""
    strides = (
        query.stride(0), query.stride(1), *keys.stride()[:3], output.stride(0), output.stride(1)
    )  # fmt: skip
    return [
        *(tensor.data_ptr() for tensor in (query, keys, values, output)),
        ctypes.addressof(scaling),
        keys.shape[2],
        *(4 * stride for stride in strides),
    ]


def shape_of(query: torch.Tensor, keys: torch.Tensor, value_dim: int) -> PagedShape:
    """What code of these tensors is compiled for."""
    return PagedShape(query.shape[0] // keys.shape[2], query.shape[2], value_dim, keys.shape[1])


@functools.cache
def can_attend(shape: PagedShape) -> bool:
    """Whether code for a shape can be compiled, and attends rightly; a warning says why not."""
    sizes = (shape.key_dim, shape.value_dim, shape.block_size)
    if not native.can_compile() or any(size % _MULTIPLE for size in sizes):
        return False
    try:
        error = _trial(shape)
    except Exception as caught:  # whatever LLVM raises
        _log.warning("decodes attend by PyTorch's products: %s", str(caught).splitlines()[:1])
        return False
    if not error < _CHECK_BOUND:
        _log.warning("decodes attend by PyTorch's products, as ours are wrong by %.1e", error)
    return error < _CHECK_BOUND


def _trial(shape: PagedShape) -> float:
    """The largest difference of random contexts from attention in float64; values are about 1."""
    generator = torch.Generator().manual_seed(0)
    size, num_kv_heads, num_blocks = shape.block_size, 2, 5
    width = max(shape.key_dim, shape.value_dim)
    cache = torch.randn(num_blocks, 2, size, num_kv_heads, width, generator=generator)
    lengths, table = (1, 3 * size - 5), (4, 1, 3)
    last = lengths[1] - 2 * size
    cache[table[2], :, last:] = torch.nan  # as others may have left it
    query = torch.randn(shape.group * num_kv_heads, 2, shape.key_dim, generator=generator)
    spans = [SequenceSpan(i, 1, n, table) for i, n in enumerate(lengths)]
    output = torch.empty(2, shape.group * num_kv_heads, shape.value_dim)
    keys, values = cache.unbind(1)
    scaling = shape.key_dim**-0.5
    PagedDecodes(spans, None, size).attend(query, keys, values, output, scaling)
    worst = 0.0
    for row, length in enumerate(lengths):
        flat = cache[list(table)].double().movedim(1, 0).flatten(1, 2)[:, :length]
        one = flat[0].repeat_interleave(shape.group, 1)[..., : shape.key_dim]
        two = flat[1].repeat_interleave(shape.group, 1)[..., : shape.value_dim]
        scores = torch.einsum("hd,shd->hs", query[:, row].double(), one) * scaling
        expected = torch.einsum("hs,shd->hd", scores.softmax(-1), two)
        worst = max(worst, float((output[row] - expected).abs().max()))
    return worst


@functools.cache
def compiled(shape: PagedShape) -> int:
    """The address of the code for a shape."""
    from hotset.attention.paged_code import make_module

    return native.compile_function(make_module(shape), "attend")
