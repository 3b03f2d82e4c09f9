"""Matrices of a GGUF file without loss, in tiles of a CPU or in planes of a GPU.

Codes, scales and factors stay as they are.

A type that is not listed is widened by `gguf.dequantize`. Codes of 5 and 6 bits and those that
are places in a table (IQ4) are opened to 8 bits, which is exact and wider than the file.
Source: the blocks of each type: llama.cpp's `ggml-common.h` and `gguf-py/gguf/quants.py`.
"""

from collections.abc import Callable

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import IQ4_NL, Q4_K
from numpy.typing import NDArray

from hotset.linear.narrow_matrix import Planes
from hotset.linear.tiles import TileFormat, Tiles, make_tiles
from hotset.weight_format import WeightFormat

Bytes = NDArray[np.uint8]
# Codes, scales and minima, their factors; each of a block, by rows and blocks.
Opened = tuple[NDArray[np.generic], list[Bytes], list[NDArray[np.generic]]]

_K_QUANT = TileFormat(4, span=256, has_factors=True, has_minimum=True)
FORMS = {
    "Q4_0": TileFormat(4, middle=8),
    "Q4_1": TileFormat(4, has_minimum=True),
    "Q8_0": TileFormat(8),
    "Q4_K": _K_QUANT,
    "Q5_K": TileFormat(8, span=256, has_factors=True, has_minimum=True),
    "Q6_K": TileFormat(8, group=16, span=256, has_factors=True),
    "IQ4_NL": TileFormat(8),
    "IQ4_XS": TileFormat(8, span=256, has_factors=True),
}


def weight_format(kind: str) -> WeightFormat:
    """How a GPU has matrices of a type of `FORMS`."""
    form = FORMS[kind]
    return WeightFormat(
        "int4" if form.code_bits == 4 else "int8",
        "float16",
        1,
        form.group,
        span=form.span if form.has_factors else None,
        has_minimum=form.has_minimum,
    )


def planes_of(data: Bytes, kind: GGMLQuantizationType, order: torch.Tensor | None = None) -> Planes:
    """The planes of a matrix in `weight_format`, on the CPU; arguments as for `tiles_of`."""
    form = FORMS[kind.name]
    codes, scales, factors = _opened(data, kind, order)
    if form.code_bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    if not form.has_factors and not form.has_minimum:
        scales = scales.squeeze(-1)
    return codes.view(torch.uint8), scales, factors


def tiles_of(data: Bytes, kind: GGMLQuantizationType, order: torch.Tensor | None = None) -> Tiles:
    """Put a matrix into tiles.

    Args:
        data: `[N, bytes of a row]`, as the file has it.
        kind: its type, one of `FORMS`.
        order: the row of the file that is each row of the result; None is the same.
    """
    return make_tiles(FORMS[kind.name], *_opened(data, kind, order))


def _opened(
    data: Bytes, kind: GGMLQuantizationType, order: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes `[N, K]`, scales `[N, K / span, P]` and factors `[N, K / group, P]`."""
    form = FORMS[kind.name]
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.ascontiguousarray(data).reshape(data.shape[0], -1, block_bytes)
    if order is not None:
        blocks = blocks[order.numpy()]
    codes, scales, factors = _OPENERS[kind.name](blocks)
    code_type = np.uint8 if form.code_bits == 4 else np.int8
    parts = [np.ascontiguousarray(part).view(np.float16)[..., 0] for part in scales]
    if form.has_minimum and form.has_factors:
        parts[1] = -parts[1]  # k-quants subtract it
    return (
        torch.from_numpy(codes.astype(code_type, copy=False).reshape(len(blocks), -1)),
        torch.from_numpy(np.stack(parts, axis=-1)),
        _factors(factors, len(blocks)) if factors else None,
    )


def _factors(factors: list[NDArray[np.generic]], num_rows: int) -> torch.Tensor:
    rows = [part.astype(np.int8, copy=False).reshape(num_rows, -1) for part in factors]
    return torch.from_numpy(np.stack(rows, axis=-1))


def _halves(packed: Bytes, run: int) -> Bytes:
    """Codes of 4 bits; of each `run` bytes first the lower halves, then the upper ones."""
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*packed.shape[:-1], -1)


def _q4_0(blocks: Bytes) -> Opened:
    return _halves(blocks[..., 2:], 16), [blocks[..., :2]], []


def _q4_1(blocks: Bytes) -> Opened:
    return _halves(blocks[..., 4:], 16), [blocks[..., :2], blocks[..., 2:4]], []


def _q8_0(blocks: Bytes) -> Opened:
    return blocks[..., 2:].view(np.int8), [blocks[..., :2]], []


def _k_factors(blocks: Bytes) -> list[NDArray[np.generic]]:
    flat = np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12)
    return [part.reshape(*blocks.shape[:2], 8) for part in Q4_K.get_scale_min(flat)]


def _q4_k(blocks: Bytes) -> Opened:
    scales = [blocks[..., :2], blocks[..., 2:4]]
    return _halves(blocks[..., 16:], 32), scales, _k_factors(blocks)


def _q5_k(blocks: Bytes) -> Opened:
    low = _halves(blocks[..., 48:], 32).reshape(*blocks.shape[:2], 8, 32)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks[..., None, 16:48] >> bits) & 1
    scales = [blocks[..., :2], blocks[..., 2:4]]
    return low | (high << 4), scales, _k_factors(blocks)


def _q6_k(blocks: Bytes) -> Opened:
    low = _halves(blocks[..., :128], 64).reshape(*blocks.shape[:2], 8, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    pairs = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = ((pairs >> shifts) & 3).reshape(low.shape)
    codes = (low | (high << 4)).view(np.int8) - np.int8(32)
    return codes, [blocks[..., 208:210]], [blocks[..., 192:208].view(np.int8)]


def _table(codes: Bytes) -> NDArray[np.int8]:
    return np.array(IQ4_NL.kvalues, dtype=np.int8)[codes]


def _iq4_nl(blocks: Bytes) -> Opened:
    return _table(_halves(blocks[..., 2:], 16)), [blocks[..., :2]], []


def _iq4_xs(blocks: Bytes) -> Opened:
    high = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16)
    high = ((high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8)
    low = blocks[..., 4:8]
    low = np.stack([low & 15, low >> 4], axis=-1).reshape(high.shape)
    factors = (low | (high << 4)).view(np.int8) - np.int8(32)
    return _table(_halves(blocks[..., 8:], 16)), [blocks[..., :2]], [factors]


_OPENERS: dict[str, Callable[[Bytes], Opened]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
