"""Products of 8-bit weights with 8-bit inputs by PyTorch: cuBLASLt's, for many rows on a GPU.

Scales of rows are known from compute capability 8.9 on; those of 128 columns of an input with
blocks of 128 x 128 of a weight on Hopper, with CUDA 12.9. Sums leave the tensor core as those of
`kernels.eight_bit` do (`use_fast_accum` is off).
"""

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from hotset.linear.narrow_matrix import NarrowMatrix, open_scales

_BLOCK = 128
_MULTIPLE = 16  # of both sizes
_PADDED = 4  # groups of a column of scales, which begins where 16 bytes are read at once


def takes(matrix: NarrowMatrix, dtype: torch.dtype) -> bool:
    """Whether PyTorch has a product for a weight and outputs of this dtype."""
    form, (num_rows, num_columns) = matrix.form, matrix.shape
    if form.input_bits != 8 or dtype != torch.bfloat16:
        return False
    if form.columns is None:
        return form.rows == 1 and not num_rows % _MULTIPLE and not num_columns % _MULTIPLE
    is_block = (form.rows, form.columns) == (_BLOCK, _BLOCK)
    return is_block and not num_rows % _BLOCK and not num_columns % _BLOCK


def scaled_product(
    codes: torch.Tensor, scales: torch.Tensor, payload: torch.Tensor, matrix: NarrowMatrix
) -> torch.Tensor:
    """`[T, N]` bfloat16.

    Args:
        codes: `[T, K]` float8_e4m3fn, contiguous.
        scales: `[T, groups]` float32.
        payload: of the weight.
        matrix: one that `takes` is true of.
    """
    stored, factors, _ = matrix.views(payload)
    weight, factors = stored.view(torch.float8_e4m3fn).t(), open_scales(factors)
    if matrix.form.columns is None:
        recipes = ScalingType.RowWise, ScalingType.RowWise
        of_weight = factors.view(1, -1)
    else:
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        scales = scales.t().contiguous().t()
        of_weight = functional.pad(factors, (0, -factors.shape[1] % _PADDED)).t()
    return functional.scaled_mm(
        codes, weight, scales, recipes[0], of_weight, recipes[1], output_dtype=torch.bfloat16
    )
