"""The product of a tile of narrow weights, which are widened in registers, with rows of inputs.

Widened weights are the left operand, which tensor cores of Hopper take from registers. There a
thread has 4 of each 16 columns: `2t, 2t + 1, 2t + 8, 2t + 9`, with t of 0 to 3. So the columns of a
tile are taken in another order, by which a thread's codes are neighbours in memory: a run of 64
columns is 4 units of 16, and thread t has unit t. Inputs of 8-bit codes are read in that order;
those of 4-bit codes lie in it (`in_order`), as a byte has two columns.

On a GPU four bytes are opened at a time, by PTX that puts two weights into the halves of a register
(`IN_PAIRS`): Triton's own operations take 10 instructions per weight, and these 3 to 6, where 4 are
time for at the rate of the memory. Elsewhere the same values come from the operations. Which four
codes of a thread are opened together is up to the compiler, so each comes with its own scale.
"""

from typing import Any

import triton
import triton.language as tl

UNIT = tl.constexpr(16)  # columns of a thread that are neighbours
RUN_COLUMNS = 64  # whose order changes among themselves
RUN = tl.constexpr(RUN_COLUMNS)

# Sign and exponent to where bfloat16 has them: a value of 2**-126 times the code's. Both halves of
# a product with 2**12 + 2**6 stay apart, as a code has 4 bits.
_E2M1 = tl.constexpr("""
{
    .reg .b32 u, t, none;
    mov.b32 none, 0x80008000;
    prmt.b32 u, $4, 0, 0x4140;
    and.b32 t, u, 0x000F000F;
    mul.lo.u32 t, t, 0x1040;
    and.b32 t, t, 0x81C081C0;
    fma.rn.bf16x2 $0, t, $5, none;
    and.b32 t, u, 0x00F000F0;
    mul.lo.u32 t, t, 0x0104;
    and.b32 t, t, 0x81C081C0;
    fma.rn.bf16x2 $2, t, $5, none;
    prmt.b32 u, $4, 0, 0x4342;
    and.b32 t, u, 0x000F000F;
    mul.lo.u32 t, t, 0x1040;
    and.b32 t, t, 0x81C081C0;
    fma.rn.bf16x2 $1, t, $6, none;
    and.b32 t, u, 0x00F000F0;
    mul.lo.u32 t, t, 0x0104;
    and.b32 t, t, 0x81C081C0;
    fma.rn.bf16x2 $3, t, $6, none;
}
""")
# The bits of 128 + n, or of 1024 + n as a half float, less what zero has there: exact. The product
# with the scale is rounded once.
_INT4 = """
{
    .reg .b32 u, t, one, none;
    mov.b32 none, 0x80008000;
    mov.b32 one, ONE;
    prmt.b32 u, $4, 0, 0x4140;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE t, t, one, $7;
    fma.rn.TYPE $0, t, $5, none;
    shr.u32 u, u, 4;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE t, t, one, $7;
    fma.rn.TYPE $2, t, $5, none;
    prmt.b32 u, $4, 0, 0x4342;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE t, t, one, $8;
    fma.rn.TYPE $1, t, $6, none;
    shr.u32 u, u, 4;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE t, t, one, $8;
    fma.rn.TYPE $3, t, $6, none;
}
"""


def _int4(one: str, base: str, type_: str) -> Any:
    text = _INT4.replace("ONE", one).replace("BASE", base).replace("TYPE", type_)
    return tl.constexpr(text)


_INT4_BFLOAT16 = _int4("0x3F803F80", "0x43004300", "bf16x2")
_INT4_FLOAT16 = _int4("0x3C003C00", "0x64006400", "f16x2")
# Half floats of 2**-8 times the code's value.
_E4M3 = tl.constexpr("""
{
    .reg .b32 u, t;
    prmt.b32 u, $2, 0, 0x1404;
    and.b32 t, u, 0x7F007F00;
    shr.u32 t, t, 1;
    lop3.b32 $0, u, 0x80008000, t, 0xEA;
    prmt.b32 u, $2, 0, 0x3424;
    and.b32 t, u, 0x7F007F00;
    shr.u32 t, t, 1;
    lop3.b32 $1, u, 0x80008000, t, 0xEA;
}
""")


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
    PER_BYTE: tl.constexpr = 1 if PLANES[0] == 0 else 2
    WIDTH: tl.constexpr = GROUP if GROUP < DEPTH else DEPTH  # columns of a tile with one scale
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    NUM_INPUTS: tl.constexpr = K if PER_BYTE == 1 else (K + RUN - 1) // RUN * RUN
    IS_WHOLE: tl.constexpr = K % DEPTH == 0
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
    for start in range(0, K, DEPTH):
        is_input = IS_WHOLE | (start + i < NUM_INPUTS)
        x = tl.load(x_at + start, mask=is_input, other=0.0)
        is_code = IS_WHOLE | (start // PER_BYTE + byte < K // PER_BYTE)
        codes = tl.load(codes_at + start // PER_BYTE, mask=is_code, other=0)
        codes = tl.reshape(codes, [COLUMNS, DEPTH // WIDTH, WIDTH // UNIT, UNIT // PER_BYTE])
        is_group = IS_WHOLE | (start // GROUP + g < NUM_GROUPS)
        group = first_group + start // GROUP
        scale = load_scales(payload, group, is_group, PLANES)
        zero = load_zeros(payload, group, is_group, PLANES)
        weight = widen(codes, scale, zero, PLANES, dtype, IN_PAIRS)
        if PER_BYTE == 1:
            weight = tl.reshape(weight, [COLUMNS, DEPTH // RUN, 4, 4, 2, 2])
            weight = tl.permute(weight, [0, 1, 3, 4, 2, 5])
        else:
            weight = tl.reshape(weight, [COLUMNS, DEPTH // RUN, 4, 2, 2, 2, 2])
            weight = tl.permute(weight, [0, 1, 6, 3, 4, 2, 5])
        sums = tl.dot(tl.reshape(weight, [COLUMNS, DEPTH]), x, sums)
    if PLANES[5] == 4:  # scales of rows
        rows_at = (payload + PLANES[3]).to(tl.pointer_type(tl.float32))
        sums *= (tl.load(rows_at + scale_row) * 256.0)[:, None]
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def load_scales(payload, index, mask, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of groups as they are stored; 0 of those that are not there."""
    at = payload + PLANES[2]
    if PLANES[5] == 0:
        at = at.to(tl.pointer_type(tl.float32))
    elif PLANES[5] == 1:
        at = at.to(tl.pointer_type(tl.bfloat16))
    elif PLANES[5] == 2:
        at = at.to(tl.pointer_type(tl.float16))
    else:
        at = at.to(tl.pointer_type(tl.uint8))
    return tl.load(at + index, mask=mask, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def load_zeros(payload, index, mask, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is subtracted from 4-bit integers of groups."""
    if PLANES[0] == 2 and PLANES[3] >= 0:
        zeros_at = (payload + PLANES[3]).to(tl.pointer_type(tl.uint8))
        zero = tl.load(zeros_at + index, mask=mask, other=0)
    else:
        zero = tl.full([1, 1, 1, 1], 8, tl.uint8)
    return zero


@triton.jit  # type: ignore[untyped-decorator]
def widen(  # type: ignore[no-untyped-def]
    codes, scale, zero, PLANES: tl.constexpr, dtype: tl.constexpr, IN_PAIRS: tl.constexpr
):
    """`[..., bytes]` codes to weights of `dtype`: `[..., bytes]`; of 4 bits `[..., bytes, 2]`."""
    if PLANES[0] == 0:
        if IN_PAIRS:
            half = tl.inline_asm_elementwise(
                _E4M3, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            )
            wide = half.to(tl.float32)
        else:
            wide = _open(codes, PLANES[0])
        weight = (wide * _factors(scale, PLANES)).to(dtype)
    else:
        if not IN_PAIRS:
            factor = _factors(scale, PLANES)
            low, high = _open(codes & 15, PLANES[0]), _open(codes >> 4, PLANES[0])
            if PLANES[0] == 2:
                low -= zero.to(tl.float32)
                high -= zero.to(tl.float32)
            low, high = (low * factor).to(dtype), (high * factor).to(dtype)
        elif PLANES[0] == 1:  # a scale is 2 at most; with 2**126 it is a bfloat16 too
            if PLANES[5] == 3:
                factor = ((scale.to(tl.int32) + 126) << 7).to(tl.int16)
            else:
                wide = (_open(scale, 0) * 2.0**126).to(tl.bfloat16)
                factor = wide.to(tl.int16, bitcast=True)
            low, high = tl.inline_asm_elementwise(
                _E2M1, "=r,=r,=r,=r,r,r,r", [codes, factor],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        elif dtype == tl.bfloat16:
            factor = scale.to(tl.int16, bitcast=True)
            minus = (zero.to(tl.int32) | 0xC300).to(tl.int16)
            low, high = tl.inline_asm_elementwise(
                _INT4_BFLOAT16, "=r,=r,=r,=r,r,r,r,r,r", [codes, factor, minus],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            factor = scale.to(tl.int16, bitcast=True)
            minus = (zero.to(tl.int32) | 0xE400).to(tl.int16)
            low, high = tl.inline_asm_elementwise(
                _INT4_FLOAT16, "=r,=r,=r,=r,r,r,r,r,r", [codes, factor, minus],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
        weight = tl.join(low, high)
    return weight


@triton.jit  # type: ignore[untyped-decorator]
def _factors(scale, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales in float32, with the power of 2 by which codes are opened too small."""
    if PLANES[5] == 3:  # an exponent; that of 2**-127 has bits of its own
        bits = scale.to(tl.int32) << 23
        factor = tl.where(bits == 0, 0x400000, bits).to(tl.float32, bitcast=True)
    elif PLANES[5] == 4:  # over 256, which sums take back
        factor = _open(scale, 0)
    else:
        factor = scale.to(tl.float32)
    if PLANES[0] == 0:
        factor *= 256.0
    elif PLANES[0] == 1:
        factor *= 16384.0
    return factor


@triton.jit  # type: ignore[untyped-decorator]
def _open(codes, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as float32, by their bits: as a half float with the same exponent and mantissa."""
    bits = codes.to(tl.uint16)
    if CODE == 0:
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        wide = half.to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == 1:
        half = ((bits & 8) << 12) | ((bits & 7) << 9)
        wide = half.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        wide = bits.to(tl.float32)
    return wide
