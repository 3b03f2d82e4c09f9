"""Inputs in 8-bit floats, and products with them, as PyTorch computes them on any device."""

import torch
from torch.nn import functional

from hotset.linear.fp8 import FP8_MAX, to_fp8
from hotset.linear.narrow_matrix import NarrowMatrix, open_codes, open_scales

_LEAST_SCALE = 1e-12  # of zeros


def rounded_rows(x: torch.Tensor, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, K]` floats to 8-bit floats and the `[T, groups]` float32 scale of each group.

    Args:
        x: see above.
        group: columns that share a scale; None is all of a row.
    """
    num_rows, num_columns = x.shape
    width = group or num_columns
    padded = functional.pad(x.float(), (0, -num_columns % width)).view(num_rows, -1, width)
    scales = (padded.abs().amax(-1) * (1 / FP8_MAX)).clamp(min=_LEAST_SCALE)
    return to_fp8(padded, scales.unsqueeze(-1)).flatten(1)[:, :num_columns].contiguous(), scales


def eight_bit_product(
    x: torch.Tensor, payload: torch.Tensor, matrix: NarrowMatrix, part: int | None = None
) -> torch.Tensor:
    """`[T, N]` float32 of `[T, K]` floats, which are rounded, and a weight of 8-bit floats.

    Reference of `kernels.eight_bit`, up to the order of sums within a group.

    Args:
        x: see above.
        payload: of the weight.
        matrix: `[N, K]`, or `[2, N, K]`.
        part: of the latter.
    """
    form = matrix.form
    codes, scales, _ = matrix.views(payload)
    if part is not None:
        codes, scales = codes[part], scales[part]
    weight, factors = open_codes(form, codes), open_scales(scales)
    if form.rows not in (None, 1):
        factors = factors.repeat_interleave(form.rows, 0)[: len(weight)]
    rounded, x_scales = rounded_rows(x, form.columns)
    width = form.columns or x.shape[1]
    out = torch.zeros(len(x), len(weight), device=x.device)
    for group, start in enumerate(range(0, x.shape[1], width)):
        columns = slice(start, start + width)
        sums = rounded[:, columns].float() @ weight[:, columns].t()
        out += sums * (factors[:, group] * x_scales[:, group : group + 1])
    return out
