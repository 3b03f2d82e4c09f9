"""A rank's part of a matrix in few bits: its codes, and what scales them.

Slices have to begin and end with groups that share a scale. Where those of experts do not, groups
are halved as often as it takes, each half with the scale of the whole: no number changes.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from hotset.linear.narrow_matrix import Planes
from hotset.parallel.parts import Part
from hotset.weight_format import WeightFormat


def can_cut(form: WeightFormat, length: int, part: Part) -> bool:
    """Whether slices begin and end with groups, and with bytes.

    Args:
        form: of a matrix.
        length: of the dimension along which it is cut.
        part: of it.
    """
    unit = math.lcm(_group(form, part.dim) or 1, max(1, 8 // form.code_bits) if part.dim else 1)
    ends = [end for each in part.slices for end in (each.start, each.stop)]
    return all(end % unit == 0 or end == length for end in ends)


def halved(form: WeightFormat, cuts: Iterable[tuple[int, Part]]) -> WeightFormat:
    """A format of the same numbers whose groups end where slices do, as far as halves can.

    Args:
        form: of matrices.
        cuts: `(length, part)` of them, as for `can_cut`.
    """
    for length, part in cuts:
        while not can_cut(form, length, part) and (_group(form, part.dim) or 1) % 2 == 0:
            half = (_group(form, part.dim) or 0) // 2
            form = replace(form, columns=half) if part.dim else replace(form, rows=half)
    return form


def cut_planes(planes: Planes, stored: WeightFormat, form: WeightFormat, part: Part) -> Planes:
    """The planes of a part of a matrix, or of matrices, `[..., N, K]` each.

    Args:
        planes: of all of it.
        stored: how it is stored.
        form: how the part is; `stored`, or `halved` from it.
        part: along N (0) or K (1); see `can_cut`.
    """
    codes, scales, more = planes
    per_byte = max(1, 8 // form.code_bits)
    num_rows, num_columns = codes.shape[-2], codes.shape[-1] * per_byte
    cut_codes = _cut(codes, codes.ndim - 2 + part.dim, part, per_byte if part.dim else 1)

    def of_groups(plane: torch.Tensor) -> torch.Tensor:
        plane = _spread(plane, plane.ndim - 2, num_rows, stored.rows, form.rows)
        plane = _spread(plane, plane.ndim - 1, num_columns, stored.columns, form.columns)
        return _cut(plane, plane.ndim - 2 + part.dim, part, _group(form, part.dim))

    if more is not None and stored.has_row_scales:
        more = more if part.dim else _cut(more, more.ndim - 1, part, 1)
    elif more is not None and stored.code != "table4":
        more = of_groups(more)
    return cut_codes, of_groups(scales), more


def _group(form: WeightFormat, dim: int) -> int | None:
    return form.columns if dim else form.rows


def _cut(plane: torch.Tensor, dim: int, part: Part, group: int | None) -> torch.Tensor:
    """Slices of a plane that has a number for each `group` rows or columns, or one for all."""
    if group is None or plane.shape[dim] == 1:
        return plane
    slices = [slice(each.start // group, -(-each.stop // group)) for each in part.slices]
    return Part(dim, tuple(slices)).of(plane)


def _spread(
    plane: torch.Tensor, dim: int, length: int, stored: int | None, group: int | None
) -> torch.Tensor:
    """A plane of groups of `stored` of `length` rows or columns as one of groups of `group`."""
    if stored is None or group is None or stored == group:
        return plane
    return plane.repeat_interleave(stored // group, dim).narrow(dim, 0, -(-length // group))
