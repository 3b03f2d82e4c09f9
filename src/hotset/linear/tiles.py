"""Narrow weights in tiles, as products on a CPU read them.

N = rows of a weight (outputs), K = columns (inputs). A tile holds 32 rows, column by column, so
that one load of a processor has the same column of many rows. Codes, scales and factors are the
file's own; only their order changes, and it changes back without loss.

    weight = scale * factor * (code - middle) + minimum * minimum's factor

in float32, rounded once. The product of a scale of 11 bits, a factor and a code is exact, so these
are the values that `gguf.dequantize` gives.
"""

from dataclasses import dataclass

import torch

TILE_ROWS = 32
WORD_COLUMNS = 8  # codes of 4 bits in a word


@dataclass(frozen=True, slots=True)
class TileFormat:
    """How the numbers of a weight are stored.

    Attributes:
        code_bits: of a code: 4, from 0 to 15; or 8, from -128 to 127.
        middle: what is subtracted from a code.
        group: columns that share a factor, or a scale where there are no factors; at most 256.
        span: columns that share a scale; a multiple of `group` that divides 256.
        has_factors: whether a group has a factor, in 8 bits, for its scale.
        has_minimum: whether a span has a minimum beside its scale, and a group a factor for it.
    """

    code_bits: int
    middle: int = 0
    group: int = 32
    span: int = 32
    has_factors: bool = False
    has_minimum: bool = False

    @property
    def num_parts(self) -> int:
        """Numbers that a span has: its scale, and its minimum."""
        return 1 + self.has_minimum

    @property
    def columns_together(self) -> int:
        """Columns whose codes are in the same words."""
        return WORD_COLUMNS if self.code_bits == 4 else 1

    @property
    def bits(self) -> float:
        """Of one weight, with its part of the group's and the span's."""
        factor_bits = 8 / self.group if self.has_factors else 0.0
        return self.code_bits + self.num_parts * (16 / self.span + factor_bits)


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """A weight of N rows and K columns in T tiles; P is `form.num_parts`.

    Attributes:
        form: how its numbers are stored.
        num_rows: N. The rows that fill the last tile are zeros.
        codes: `[T, K / 8, 32]` int32 for 4 bits: a word has the codes of 8 columns of a row, the
            first in its lowest bits; `[T, K, 32]` int8 for 8 bits.
        scales: `[T, K / span, P, 32]` float16.
        factors: `[T, K / group, P, 32]` int8, or None.
    """

    form: TileFormat
    num_rows: int
    codes: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor | None

    @property
    def num_columns(self) -> int:
        """K."""
        return self.scales.shape[1] * self.form.span

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        factors = 0 if self.factors is None else self.factors.nbytes
        return self.codes.nbytes + self.scales.nbytes + factors

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The weights of some rows, `[R]` int64 from 0 to N - 1, as float32 `[R, K]`."""
        form, tile, row = self.form, indices // TILE_ROWS, indices % TILE_ROWS
        codes = self.codes[tile, :, row]
        if form.code_bits == 4:
            pairs = codes.view(torch.uint8)  # the lowest bits first
            codes = torch.stack([pairs & 15, pairs >> 4], dim=-1)
        parts = self.scales[tile, :, :, row].float()  # [R, K / span, P]
        parts = parts.repeat_interleave(form.span // form.group, dim=1)
        if self.factors is not None:
            parts = parts * self.factors[tile, :, :, row].float()
        grouped = codes.float().sub_(form.middle).view(len(indices), -1, form.group)
        grouped *= parts[..., :1]
        if form.has_minimum:
            grouped += parts[..., 1:]
        return grouped.view(len(indices), -1)


def make_tiles(
    form: TileFormat, codes: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor | None
) -> Tiles:
    """Put a weight into tiles.

    Args:
        form: how its numbers are stored.
        codes: `[N, K]`, uint8 for 4 bits, int8 for 8.
        scales: `[N, K / span, P]` float16.
        factors: `[N, K / group, P]` int8, or None.
    """
    if form.code_bits == 4:
        codes = (codes[:, ::2] | (codes[:, 1::2] << 4)).view(torch.int32)
    return Tiles(
        form,
        codes.shape[0],
        _tiled(codes).movedim(1, -1).contiguous(),
        _tiled(scales).movedim(1, -1).contiguous(),
        None if factors is None else _tiled(factors).movedim(1, -1).contiguous(),
    )


def join_tiles(parts: list[Tiles]) -> Tiles:
    """The weight of all rows of `parts`, one after another.

    Their forms and K are the same; N of all but the last is a multiple of 32.
    """
    factors = [part.factors for part in parts if part.factors is not None]
    return Tiles(
        parts[0].form,
        sum(part.num_rows for part in parts),
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(factors) if factors else None,
    )


def _tiled(values: torch.Tensor) -> torch.Tensor:
    """`[N, ...]` to `[T, 32, ...]`, after rows of zeros that fill the last tile."""
    missing = -values.shape[0] % TILE_ROWS
    if missing:
        values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
    return values.view(-1, TILE_ROWS, *values.shape[1:])
