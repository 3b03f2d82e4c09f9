"""What kernels compute of experts in few bits. Imports no torch."""

from dataclasses import dataclass

from hotset.weight_format import WeightFormat

# Numbers by which kernels know them.
CODES = {"e4m3": 0, "e2m1": 1, "int4": 2, "int8": 3, "table4": 4}
SCALES = {"float32": 0, "bfloat16": 1, "float16": 2, "e8m0": 3, "e4m3": 4}
_LEAST_GROUP = 16
LEAST_ROUNDED_GROUP = 64  # columns of 8-bit weights and inputs that are multiplied at once


@dataclass(frozen=True, slots=True)
class Gate:
    """What is between the products of an expert.

    `silu(gate) * up` of the first and the second half of the rows of the up matrix; or, with
    `alpha`, gpt-oss's of even and odd rows: gate up to `limit`, up within it, and
    `gate * sigmoid(alpha * gate) * (up + 1)`.
    """

    alpha: float = 0.0
    limit: float = 0.0


def can_read(form: WeightFormat) -> bool:
    """Whether the kernels widen what is stored so."""
    columns = form.columns
    is_power = columns is None or (columns >= _LEAST_GROUP and columns & (columns - 1) == 0)
    # Scales of 8-bit floats come with those of rows, which take back what is left out of them.
    fits = (form.scale == "e4m3") == form.has_row_scales and (
        form.code == "e2m1" or not form.has_row_scales
    )
    if form.span is not None or form.has_minimum:
        fits &= form.code in ("int4", "int8") and form.scale == "float16" and form.rows == 1
    is_known = form.code in CODES and form.scale in SCALES
    return is_known and is_power and fits and _can_round(form)


def _can_round(form: WeightFormat) -> bool:
    """Whether inputs stay as they come, or the kernels multiply rounded ones."""
    if form.input_bits == 16:
        return True
    is_wide = form.columns is None or form.columns >= LEAST_ROUNDED_GROUP
    return form.code == "e4m3" and form.scale == "float32" and is_wide
