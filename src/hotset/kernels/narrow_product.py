"""The product of a tile of narrow weights, which are widened in registers, with rows of inputs.

Widened weights are the left operand, which tensor cores of Hopper take from registers. There a
thread has 4 of each 16 columns: `2t, 2t + 1, 2t + 8, 2t + 9`, with t of 0 to 3. So the columns of a
tile are taken in another order, by which a thread's codes are neighbours in memory: a run of 64
columns is 4 units of 16, and thread t has unit t. Inputs of 8-bit codes are read in that order;
those of 4-bit codes lie in it (`in_order`), as a byte has two columns.

Where all columns of a tile share the scale of their group (8-bit floats and integers in large
groups), codes are multiplied as they are, which is exact, and scales multiply the float32 sums of
each tile. Others are widened with their scales (`narrow_codes`).
"""

import triton
import triton.language as tl

from hotset.kernels.narrow_codes import load_scales, load_zeros, open_exactly, widen

UNIT = tl.constexpr(16)  # columns of a thread that are neighbours
RUN_COLUMNS = 64  # whose order changes among themselves
RUN = tl.constexpr(RUN_COLUMNS)


@triton.jit
def in_order(column):  # type: ignore[no-untyped-def]
    """Where the input of a column of 4-bit codes lies: bits t s h e n of a run as n s h t e."""
    lower = column // 8 % 2 * 16 + column // 4 % 2 * 8 + column // 16 % 4 * 2 + column // 2 % 2
    return column // RUN * RUN + column % 2 * 32 + lower


@triton.jit  # type: ignore[untyped-decorator]
def narrow_product(  # type: ignore[no-untyped-def]
    payload,
    row,
    scale_row,
    x_at,
    PLANES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IN_PAIRS: tl.constexpr,
):
    """`[COLUMNS, BLOCK_ROWS]` float32 sums over all K columns of an expert's matrix.

    Args:
        payload: address of the expert, a multiple of 128.
        row: `[COLUMNS]` rows of the matrix.
        scale_row: `[COLUMNS]` their rows among the scales.
        x_at: `[1, BLOCK_ROWS]` pointers to rows of inputs.
        PLANES: see `narrow_launch.planes_of`.
        K: columns of the matrix.
        BLOCK_ROWS: of inputs.
        COLUMNS: of the output.
        DEPTH: columns of the matrix that are read together, a multiple of 64.
        IN_PAIRS: see above.
    """
    GROUP: tl.constexpr = PLANES[4]
    PER_BYTE: tl.constexpr = 1 if PLANES[0] == 0 or PLANES[0] == 3 else 2
    WIDTH: tl.constexpr = GROUP if GROUP < DEPTH else DEPTH  # columns of a tile with one scale
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    NUM_INPUTS: tl.constexpr = K if PER_BYTE == 1 else (K + RUN - 1) // RUN * RUN
    IS_WHOLE: tl.constexpr = K % DEPTH == 0
    HAS_PARTS: tl.constexpr = PLANES[7] != 0 or PLANES[8] == 2
    IS_NUMBER: tl.constexpr = PLANES[0] != 1 and PLANES[0] != 4
    IS_SHARED: tl.constexpr = IS_NUMBER and not HAS_PARTS and GROUP >= DEPTH
    dtype: tl.constexpr = x_at.dtype.element_ty
    g = tl.arange(0, DEPTH // WIDTH)[None, :, None, None]
    byte = tl.arange(0, DEPTH // PER_BYTE)[None, :]
    # Without this hint, which has to be on the pointer, codes are loaded byte by byte; and with
    # more than two dimensions neighbours of a warp would load from a row each.
    codes_at = tl.multiple_of(payload.to(tl.pointer_type(tl.uint8)), 16) + PLANES[1]
    codes_at += row[:, None] * (K // PER_BYTE) + byte
    first_group = scale_row[:, None, None, None] * NUM_GROUPS + g
    i = tl.arange(0, DEPTH)[:, None]
    if PER_BYTE == 1:
        i = i // RUN * RUN + i // 2 % 4 * UNIT + i // 16 % 4 * 4 + i // 8 % 2 * 2 + i % 2
    x_at += i
    sums = tl.zeros([COLUMNS, BLOCK_ROWS], tl.float32)
    if not IS_SHARED:  # those of a tile are read a tile ahead, as no copy of them is asynchronous
        scale = load_scales(payload, first_group, g < NUM_GROUPS, PLANES)
        zero = load_zeros(payload, first_group, g < NUM_GROUPS, PLANES)
    for start in range(0, K, DEPTH):
        is_input = IS_WHOLE | (start + i < NUM_INPUTS)
        x = tl.load(x_at + start, mask=is_input, other=0.0)
        is_code = IS_WHOLE | (start // PER_BYTE + byte < K // PER_BYTE)
        codes = tl.load(codes_at + start // PER_BYTE, mask=is_code, other=0)
        codes = tl.reshape(codes, [COLUMNS, DEPTH // WIDTH, WIDTH // UNIT, UNIT // PER_BYTE])
        if IS_SHARED:
            zero = load_zeros(payload, first_group + start // GROUP, True, PLANES)
            weight = open_exactly(codes, zero, PLANES, dtype, IN_PAIRS)
        else:
            group = (start + DEPTH) // GROUP
            next_scale = load_scales(payload, first_group + group, group + g < NUM_GROUPS, PLANES)
            next_zero = load_zeros(payload, first_group + group, group + g < NUM_GROUPS, PLANES)
            weight = widen(payload, codes, scale, zero, PLANES, dtype, IN_PAIRS)
            scale, zero = next_scale, next_zero
        if PER_BYTE == 1:
            weight = tl.reshape(weight, [COLUMNS, DEPTH // RUN, 4, 4, 2, 2])
            weight = tl.permute(weight, [0, 1, 3, 4, 2, 5])
        else:
            weight = tl.reshape(weight, [COLUMNS, DEPTH // RUN, 4, 2, 2, 2, 2])
            weight = tl.permute(weight, [0, 1, 6, 3, 4, 2, 5])
        weight = tl.reshape(weight, [COLUMNS, DEPTH])
        if IS_SHARED and NUM_GROUPS > 1:
            group = scale_row * NUM_GROUPS + start // GROUP
            factor = load_scales(payload, group, True, PLANES).to(tl.float32)
            sums += tl.dot(weight, x) * factor[:, None]
        else:
            sums = tl.dot(weight, x, sums)
    if IS_SHARED and NUM_GROUPS == 1:
        sums *= load_scales(payload, scale_row, True, PLANES).to(tl.float32)[:, None]
    if PLANES[5] == 4:  # scales of rows
        rows_at = (payload + PLANES[3]).to(tl.pointer_type(tl.float32))
        sums *= (tl.load(rows_at + scale_row) * 256.0)[:, None]
    return sums
