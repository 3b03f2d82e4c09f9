"""Inputs in 8-bit floats, and products of narrow weights, as PyTorch has them on any device."""

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
    padded = functional.pad(x.float(), (0, -num_columns % width))
    padded = padded.view(num_rows, -(-num_columns // width), width)
    scales = (padded.abs().amax(-1) * (1 / FP8_MAX)).clamp(min=_LEAST_SCALE)
    return to_fp8(padded, scales.unsqueeze(-1)).flatten(1)[:, :num_columns].contiguous(), scales


def reference_product(x: torch.Tensor, payload: torch.Tensor, matrix: NarrowMatrix) -> torch.Tensor:
    """`[T, N]` float32 of `[T, K]` floats and a weight, whose format says what is rounded.

    Reference of all kernels that multiply narrow weights: of inputs in 8 bits up to the order of
    sums within a group, of others up to the rounding of weights.

    Args:
        x: bfloat16, float16 or float32.
        payload: of the weight.
        matrix: `[N, K]`; or `[2, N, K]` for the two of `2 * N` rows.
    """
    form = matrix.form
    if form.input_bits == 16:
        return x.float() @ matrix.widened(payload, x.dtype).float().flatten(0, -2).t()
    codes, scales, _ = matrix.views(payload)
    factors = open_scales(scales)
    if form.rows not in (None, 1):
        factors = factors.repeat_interleave(form.rows, -2)[..., : matrix.shape[-2], :]
    factors = factors.expand(*matrix.shape[:-1], -1).flatten(0, -2)  # [N, groups]
    weight = open_codes(form, codes).flatten(0, -2)
    rounded, x_scales = rounded_rows(x, form.columns)
    width = form.columns or x.shape[1]
    out = torch.zeros(len(x), len(weight), device=x.device)
    for group, start in enumerate(range(0, x.shape[1], width)):
        columns = slice(start, start + width)
        sums = rounded[:, columns].float() @ weight[:, columns].t()
        out += sums * (factors[:, group] * x_scales[:, group : group + 1])
    return out
