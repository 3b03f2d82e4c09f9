"""A matrix in few bits as a run of bytes: what `weight_format` says of it, as tensors."""

from dataclasses import dataclass

import torch

from hotset.weight_format import E2M1, TABLE_NUMBERS, Plane, WeightFormat

_FP8 = torch.float8_e4m3fn
_DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "e8m0": torch.uint8,
    "e4m3": _FP8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Codes, scales, and what is more of it: zeros or factors of groups, scales of rows, or a table.
Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class NarrowMatrix:
    """Where the numbers of a matrix are within a payload: a run of bytes, of it and of others.

    Attributes:
        form: how it is stored.
        shape: `[N, K]`, or `[2, N, K]` where a gate and what it multiplies are apart: each has
            groups of its own then.
        codes: where its numbers are.
        scales: likewise.
        more: zeros or factors of groups, scales of rows, or a table; None where there is none.
    """

    form: WeightFormat
    shape: tuple[int, ...]
    codes: Plane
    scales: Plane
    more: Plane | None

    @staticmethod
    def of(form: WeightFormat, shape: tuple[int, ...], offset: int = 0) -> "NarrowMatrix":
        """A matrix that begins at a byte; ValueError where a row does not end with a byte."""
        codes, scales, *more = form.planes(shape, offset)
        return NarrowMatrix(form, shape, codes, scales, more[0] if more else None)

    @property
    def end(self) -> int:
        """The first byte behind all planes, with what aligns them."""
        return (self.more or self.scales).end

    def views(self, payloads: torch.Tensor) -> Planes:
        """`[..., *plane.shape]` of each plane, views of `[..., bytes]` uint8."""
        codes, scales = _view(payloads, self.codes), _view(payloads, self.scales)
        return codes, scales, None if self.more is None else _view(payloads, self.more)

    def widened(self, payloads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[..., *shape]` of `dtype`, of `[..., bytes]` uint8.

        Reference of all kernels that read narrow weights, bit-exact.
        """
        return self.widen(self.views(payloads), dtype)

    def widen(self, planes: Planes, dtype: torch.dtype) -> torch.Tensor:
        """`[..., *shape]` of `dtype` of planes that have all columns; rows may be others."""
        codes, scales, more = planes
        if self.form.span is not None or self.form.has_minimum:
            return self._widen_parts(codes, scales, more).to(dtype)
        if self.form.code == "table4":
            assert more is not None
            values = of_table(more.reshape(-1)[:TABLE_NUMBERS], codes)  # all have the same one
        else:
            values = open_codes(self.form, codes)
        if more is not None and self.form.has_zeros:
            values -= self._spread(more.float())
        values *= self._spread(open_scales(scales))
        if more is not None and self.form.has_row_scales:
            values *= more.unsqueeze(-1)
        return values.to(dtype)

    def _widen_parts(
        self, codes: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor | None
    ) -> torch.Tensor:
        """Float32 weights, whose products are exact and whose sums with a minimum round once."""
        form, num_columns = self.form, self.shape[-1]
        parts = scales.float()  # [..., N, spans, P]
        if factors is not None:
            assert form.span is not None and form.columns is not None
            parts = parts.repeat_interleave(form.span // form.columns, -2)
            parts = parts[..., : factors.shape[-2], :] * factors.float()
        values = open_codes(form, codes)
        spread = parts.repeat_interleave(form.columns or num_columns, -2)[..., :num_columns, :]
        values *= spread[..., 0]
        if form.has_minimum:
            values += spread[..., 1]
        return values

    def _spread(self, groups: torch.Tensor) -> torch.Tensor:
        """One number of each group as one that broadcasts to `[..., *shape]`."""
        num_rows, num_columns = self.shape[-2:]
        if self.form.rows not in (None, 1):
            groups = groups.repeat_interleave(self.form.rows, -2)[..., :num_rows, :]
        if self.form.columns is not None:
            groups = groups.repeat_interleave(self.form.columns, -1)[..., :num_columns]
        return groups


def open_codes(form: WeightFormat, codes: torch.Tensor) -> torch.Tensor:
    """`[..., bytes]` codes as `[..., K]` float32, in memory of their own; zeros not subtracted."""
    if form.code == "e4m3":
        return codes.view(_FP8).float()
    if form.code == "int8":
        return codes.view(torch.int8).float()
    numbers = torch.arange(16, dtype=torch.float32, device=codes.device)
    if form.code == "e2m1":
        floats = torch.tensor(E2M1, device=codes.device)
        numbers = torch.cat([floats, -floats])
    elif not form.has_zeros and not form.has_minimum:
        numbers -= 8
    return of_table(numbers, codes)


def of_table(numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`[..., K]` of the 16 numbers that the halves of `[..., K / 2]` uint8 name."""
    # By the byte: both numbers of each at once.
    pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], 1)  # [256, 2]
    return pairs.index_select(0, codes.reshape(-1).int()).view(*codes.shape[:-1], -1)


def open_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32. Bytes are exponents of 2: by their bits, as `exp2` need not be exact."""
    if scales.dtype != torch.uint8:
        return scales.float()
    bits = scales.int() << 23
    return bits.masked_fill(scales == 0, 1 << 22).view(torch.float32)  # 2**-127 has no exponent


def _view(payloads: torch.Tensor, plane: Plane) -> torch.Tensor:
    part = payloads[..., plane.offset : plane.offset + plane.num_bytes]
    view: torch.Tensor = part.view(_DTYPES[plane.dtype]).unflatten(-1, plane.shape)
    return view
