"""Products of 8-bit floats with 8-bit floats, whose scales multiply the float32 sums.

Inputs are rounded in each step, with a scale for each token and group of columns: the groups that
the weight's scales have, or whole rows. A sum leaves the tensor core with each tile of columns, as
Hopper adds within it in about 14 bits. Source: DeepSeek-V3, 3.3.2 (arXiv 2412.19437).
"""

import torch
import triton
import triton.language as tl

from hotset.kernels.narrow_codes import load_scales

_MOST_COLUMNS = 2048  # of a program that rounds inputs, where groups are smaller


@triton.jit  # type: ignore[untyped-decorator]
def _round_rows(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + token * K + column, mask=column < K, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(values), 1)
    scale = tl.maximum(most * (1.0 / 448.0), 1e-12)
    values *= tl.div_rn(1.0, scale)[:, None]
    rounded = tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes + token * K + column, rounded.to(tl.float8e4nv), mask=column < K)
    tl.store(scales + token * NUM_GROUPS + group, scale, mask=group < NUM_GROUPS)


def round_rows(x: torch.Tensor, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit floats and their scales, of a row's own values alone.

    Args:
        x: `[T, K]` floats, contiguous.
        group: columns that share a scale, a power of 2; None is all of a row.

    Returns:
        `[T, K]` float8_e4m3fn, and `[T, groups]` float32.

    Reference: `linear.eight_bit.rounded_rows`, bit-exact.
    """
    num_rows, num_columns = x.shape
    width = triton.next_power_of_2(num_columns) if group is None else group
    num_groups = triton.cdiv(num_columns, width)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=x.device)
    if not num_rows:
        return codes, scales
    groups = max(1, min(_MOST_COLUMNS // width, triton.next_power_of_2(num_groups)))
    _round_rows[(num_rows, triton.cdiv(num_groups, groups))](
        x, codes, scales, K=num_columns, NUM_GROUPS=num_groups, GROUP=width, GROUPS=groups
    )
    return codes, scales


@triton.jit  # type: ignore[untyped-decorator]
def eight_bit_product(  # type: ignore[no-untyped-def]
    payload,
    row,
    scale_row,
    x_at,
    x_scales_at,
    PLANES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """As `narrow_product`, of 8-bit weights and 8-bit inputs.

    Args:
        payload: address of the weight, a multiple of 128.
        row: `[COLUMNS]` rows of the matrix.
        scale_row: `[COLUMNS]` their rows among the scales.
        x_at: `[1, BLOCK_ROWS]` pointers to rows of codes.
        x_scales_at: `[BLOCK_ROWS]` pointers to their scales.
        PLANES: see `narrow_launch.planes_of`.
        K: columns of the matrix.
        BLOCK_ROWS: of inputs.
        COLUMNS: of the output.
        DEPTH: columns of the matrix that are read together; they have one scale.
    """
    GROUP: tl.constexpr = PLANES[4]
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    codes_at = tl.multiple_of(payload.to(tl.pointer_type(tl.float8e4nv)), 16) + PLANES[1]
    codes_at += row[:, None].to(tl.int64) * K + tl.arange(0, DEPTH)[None, :]
    i = tl.arange(0, DEPTH)
    x_at += i[:, None]
    sums = tl.zeros([COLUMNS, BLOCK_ROWS], tl.float32)
    for start in range(0, K, DEPTH):
        if K % DEPTH == 0:
            x = tl.load(x_at + start)
            codes = tl.load(codes_at + start)
        else:
            x = tl.load(x_at + start, mask=start + i[:, None] < K, other=0.0)
            codes = tl.load(codes_at + start, mask=start + i[None, :] < K, other=0.0)
        group = start // GROUP
        factor = load_scales(payload, scale_row * NUM_GROUPS + group, True, PLANES)
        x_factor = tl.load(x_scales_at + group)
        sums += tl.dot(codes, x) * (factor.to(tl.float32)[:, None] * x_factor[None, :])
    return sums
