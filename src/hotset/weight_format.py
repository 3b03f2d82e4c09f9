"""How the numbers of a matrix are stored, and what scales them. Imports no torch.

The one description of narrow weights: the planner counts bytes by it, loader and tiers lay out
memory by it, and kernels read what it names. A weight is `code * scale`, or
`(code - zero) * scale`, in float32, rounded once to the dtype of the model, wherever it is.

- e4m3: 8-bit floats. e2m1: 4-bit floats, 0 to 6 with a sign. int4: 0 to 15; 8 is subtracted where a
  group has no zero of its own. Codes of 4 bits lie two in a byte, the lower half first.
- int8: -128 to 127. table4: 4 bits, which of 16 float32 numbers that lie behind the scales.
- Scales of e8m0 are exponents of 2 with a bias of 127, a byte each. Zeros are a byte each.
- Scales of rows are float32. They multiply what a row sums to: no weight is rounded by them.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

Code = Literal["float32", "bfloat16", "float16", "int8", "e4m3", "e2m1", "int4", "table4"]
Scale = Literal["float32", "bfloat16", "float16", "e8m0", "e4m3"]

ALIGN_BYTES = 128  # of planes: what a GPU reads at once
# Numbers of the e2m1 codes 0 to 7; 8 to 15 have a minus. OCP Microscaling Formats 1.0, 5.3.3.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODE_BITS = {
    "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "e4m3": 8, "e2m1": 4, "int4": 4,
    "table4": 4,
}  # fmt: skip
TABLE_NUMBERS = 16
_SCALE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "e8m0": 8, "e4m3": 8}


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of a stored matrix.

    Attributes:
        shape: in numbers of `dtype`.
        dtype: `uint8`, or that of scales.
        offset: byte where it begins.
        num_bytes: of it, without what aligns the next one.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The first byte that can begin the next plane."""
        return -(-(self.offset + self.num_bytes) // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a matrix of N rows (outputs) and K columns (inputs) is stored.

    Attributes:
        code: of each number.
        scale: of each group; None where codes are the numbers.
        rows: of a group; None is all.
        columns: of a group; None is all.
        has_zeros: whether a group has a zero, which is subtracted from its codes.
        has_row_scales: whether a row has a scale beside its groups' scales.
        span: columns that share a scale where each group has a factor of 8 bits for it (signed), a
            multiple of `columns`; None is one scale per group. Of GGUF's k-quants.
        has_minimum: whether a group has a number that is added to its weights, stored beside the
            scale, and beside the factor where there is one; codes of int4 are 0 to 15 then.
        input_bits: of what the matrix is multiplied with: 16 is as it comes; 8 rounds it in each
            product, with a scale for each token and the columns of a group.
    """

    code: Code
    scale: Scale | None = None
    rows: int | None = 1
    columns: int | None = None
    has_zeros: bool = False
    has_row_scales: bool = False
    span: int | None = None
    has_minimum: bool = False
    input_bits: Literal[16, 8] = 16

    @property
    def name(self) -> str:
        """For people: codes and groups."""
        return self._name + (" with 8-bit inputs" if self.input_bits == 8 else "")

    @property
    def _name(self) -> str:
        if self.scale is None:
            return self.code
        if self.code == "e2m1" and self.scale == "e8m0" and self.columns == 32:
            return "mxfp4"
        if self.code == "e2m1" and self.scale == "e4m3" and self.columns == 16:
            return "nvfp4"
        if self.code == "table4":
            return "4 bits of a table (bitsandbytes)"
        what = "fp8" if self.code == "e4m3" else self.code
        if self.rows == 1:
            return what if self.columns is None else f"{what} in groups of {self.columns}"
        return what if self.rows is None else f"{what} in blocks of {self.rows} x {self.columns}"

    @property
    def code_bits(self) -> int:
        """Of one number."""
        return _CODE_BITS[self.code]

    @property
    def group_bits(self) -> int:
        """Of what a group has beside its codes."""
        scale_bits = 0 if self.scale is None else _SCALE_BITS[self.scale]
        if self.span is not None and self.columns is not None:
            return self.num_parts * (8 + scale_bits * self.columns // self.span)
        return self.num_parts * scale_bits + 8 * self.has_zeros

    @property
    def num_parts(self) -> int:
        """Numbers of a scale: itself, and a minimum."""
        return 1 + self.has_minimum

    def groups(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`[..., N, K]` to the groups of each dimension; the last of one may be smaller."""
        *others, rows, columns = shape
        return (*others, -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns)))

    def planes(self, shape: tuple[int, ...], offset: int = 0) -> tuple[Plane, ...]:
        """Codes, scales, zeros and scales of rows of `[..., N, K]`, one after another.

        The first begins at `offset`.

        Raises:
            ValueError: rows do not end with a byte.
        """
        *others, columns = shape
        if columns * self.code_bits % 8:
            raise ValueError(f"rows of {columns} numbers of {self.code_bits} bits end in a byte")
        codes = Plane(
            (*others, columns * self.code_bits // 8), "uint8", offset, self._code_bytes(shape)
        )
        planes, groups = [codes], self.groups(shape)
        parts = (self.num_parts,) if self.has_minimum or self.span is not None else ()
        if self.scale is not None:
            scales = self._scale_groups(shape) + parts
            size = math.prod(scales) * _SCALE_BITS[self.scale] // 8
            planes.append(Plane(scales, self.scale, planes[-1].end, size))
        if self.span is not None:
            factors = groups + parts
            planes.append(Plane(factors, "int8", planes[-1].end, math.prod(factors)))
        if self.code == "table4":
            size = 4 * TABLE_NUMBERS
            planes.append(Plane((TABLE_NUMBERS,), "float32", planes[-1].end, size))
        if self.has_zeros:
            planes.append(Plane(groups, "uint8", planes[-1].end, math.prod(groups)))
        if self.has_row_scales:
            planes.append(Plane(shape[:-1], "float32", planes[-1].end, 4 * math.prod(shape[:-1])))
        return tuple(planes)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all planes, without what aligns them."""
        groups = math.prod(self.groups(shape))
        scales = math.prod(self._scale_groups(shape)) if self.scale is not None else 0
        num_bytes = self._code_bytes(shape) + 4 * TABLE_NUMBERS * (self.code == "table4")
        num_bytes += scales * self.num_parts * _SCALE_BITS.get(str(self.scale), 0) // 8
        num_bytes += groups * (self.has_zeros + self.num_parts * (self.span is not None))
        return num_bytes + 4 * math.prod(shape[:-1]) * self.has_row_scales

    def bits(self, shape: tuple[int, ...] | None = None) -> float:
        """Of one number with its part of the group's.

        Args:
            shape: `[..., N, K]`; None is a matrix of whole groups, large enough for the scales of
                whole rows and matrices not to count.
        """
        if shape is not None:
            return 8 * self.num_bytes(shape) / math.prod(shape)
        if self.rows is None or self.columns is None:
            return self.code_bits
        return self.code_bits + self.group_bits / (self.rows * self.columns)

    def _scale_groups(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many scales there are of each dimension."""
        return self.groups(shape) if self.span is None else _wider(self).groups(shape)

    def _code_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.code_bits // 8


def _wider(form: WeightFormat) -> WeightFormat:
    return replace(form, columns=form.span, span=None)


FP8_ROW = WeightFormat("e4m3", "float32")
FP8_BLOCK = WeightFormat("e4m3", "float32", 128, 128)
MXFP4 = WeightFormat("e2m1", "e8m0", 1, 32)
NVFP4 = WeightFormat("e2m1", "e4m3", 1, 16, has_row_scales=True)
NF4 = WeightFormat("table4", "float32", 1, 64)  # of bitsandbytes
INT4 = WeightFormat("int4", "bfloat16", 1, 64)  # what experts are rounded to
INT4_128 = WeightFormat("int4", "bfloat16", 1, 128)
AWQ_128 = WeightFormat("int4", "float16", 1, 128, has_zeros=True)
