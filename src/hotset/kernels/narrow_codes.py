"""How codes of narrow weights become numbers in registers.

On a GPU four bytes are opened at a time, by PTX that puts two weights into the halves of a register
(`IN_PAIRS`): Triton's own operations take 10 instructions per weight, and these 2 to 6, where 4 are
time for at the rate of the memory. Elsewhere the same values come from the operations. Which four
codes of a thread are opened together is up to the compiler, so each comes with its own scale.
"""

from typing import Any

import triton
import triton.language as tl

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


# Likewise, without a scale.
_CODES4 = """
{
    .reg .b32 u, t, one;
    mov.b32 one, ONE;
    prmt.b32 u, $4, 0, 0x4140;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE $0, t, one, $5;
    shr.u32 u, u, 4;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE $2, t, one, $5;
    prmt.b32 u, $4, 0, 0x4342;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE $1, t, one, $6;
    shr.u32 u, u, 4;
    lop3.b32 t, u, 0x000F000F, BASE, 0xEA;
    fma.rn.TYPE $3, t, one, $6;
}
"""


def _int4(text: str, one: str, base: str, type_: str) -> Any:
    return tl.constexpr(text.replace("ONE", one).replace("BASE", base).replace("TYPE", type_))


_BFLOAT16 = ("0x3F803F80", "0x43004300", "bf16x2")
_FLOAT16 = ("0x3C003C00", "0x64006400", "f16x2")
_INT4_BFLOAT16, _INT4_FLOAT16 = _int4(_INT4, *_BFLOAT16), _int4(_INT4, *_FLOAT16)
_CODES4_BFLOAT16, _CODES4_FLOAT16 = _int4(_CODES4, *_BFLOAT16), _int4(_CODES4, *_FLOAT16)
# Half floats of 2**-8 times the code's value.
_E4M3_TEXT = """
{
    .reg .b32 u, t;
    prmt.b32 u, $2, 0, 0x1404;
    and.b32 t, u, 0x7F007F00;
    shr.u32 t, t, SHIFT;
    lop3.b32 $0, u, 0x80008000, t, 0xEA;
    prmt.b32 u, $2, 0, 0x3424;
    and.b32 t, u, 0x7F007F00;
    shr.u32 t, t, SHIFT;
    lop3.b32 $1, u, 0x80008000, t, 0xEA;
}
"""


def _codes8(type_: str, shift: str, factor: str) -> Any:
    text = _E4M3_TEXT.replace(" u, t;", " u, t, power, none;", 1).replace("SHIFT", shift)
    for out in ("$0", "$1"):  # to its value: exact
        text = text.replace(
            f"lop3.b32 {out}, u, 0x80008000, t, 0xEA;",
            f"lop3.b32 t, u, 0x80008000, t, 0xEA;\n    fma.rn.{type_} {out}, t, power, none;",
        )
    begin = f"none;\n    mov.b32 none, 0x80008000;\n    mov.b32 power, {factor};"
    return tl.constexpr(text.replace("none;", begin, 1))


_E4M3 = tl.constexpr(_E4M3_TEXT.replace("SHIFT", "1"))
# The bits of 1024 + 128 + n as a half float, less what zero has there: exact.
_INT8 = tl.constexpr("""
{
    .reg .b32 u, t, high, one, minus;
    mov.b32 high, 0x64646464;
    mov.b32 one, 0x3C003C00;
    mov.b32 minus, 0xE480E480;
    xor.b32 u, $2, 0x80808080;
    prmt.b32 t, u, high, 0x5140;
    fma.rn.f16x2 $0, t, one, minus;
    prmt.b32 t, u, high, 0x5342;
    fma.rn.f16x2 $1, t, one, minus;
}
""")
_TABLE = tl.constexpr("""
{
    .reg .u64 at;
    mad.wide.u32 at, $2, 4, $1;
    ld.global.nc.f32 $0, [at];
}
""")
_CODES8_BFLOAT16 = _codes8("bf16x2", "4", "0x7B807B80")  # 2**120
_CODES8_FLOAT16 = _codes8("f16x2", "1", "0x5C005C00")  # 2**8


@triton.jit  # type: ignore[untyped-decorator]
def load_scales(payload, index, mask, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of groups as they are stored; 0 of those that are not there.

    In float32, where they have factors or minima.
    """
    if PLANES[7] != 0 or PLANES[8] == 2:
        scale = _load_part(payload, index, mask, 0, PLANES)
    else:
        scale = tl.load(_scales_at(payload, PLANES) + index, mask=mask, other=0)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _load_part(payload, index, mask, PART: tl.constexpr, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales (0) or minima (1) of groups, times their factors."""
    if PLANES[7] != 0:
        at = _scales_at(payload, PLANES) + index // PLANES[7] * PLANES[8] + PART
        factors_at = (payload + PLANES[3]).to(tl.pointer_type(tl.int8)) + index * PLANES[8] + PART
        number = tl.load(at, mask=mask, other=0).to(tl.float32)
        number *= tl.load(factors_at, mask=mask, other=0).to(tl.float32)
    else:
        at = _scales_at(payload, PLANES) + index * PLANES[8] + PART
        number = tl.load(at, mask=mask, other=0).to(tl.float32)
    return number


@triton.jit  # type: ignore[untyped-decorator]
def _scales_at(payload, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    at = payload + PLANES[2]
    if PLANES[5] == 0:
        at = at.to(tl.pointer_type(tl.float32))
    elif PLANES[5] == 1:
        at = at.to(tl.pointer_type(tl.bfloat16))
    elif PLANES[5] == 2:
        at = at.to(tl.pointer_type(tl.float16))
    else:
        at = at.to(tl.pointer_type(tl.uint8))
    return at


@triton.jit  # type: ignore[untyped-decorator]
def load_zeros(payload, index, mask, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is subtracted from 4-bit integers of groups; or minima, which are added to weights."""
    if PLANES[8] == 2:
        zero = _load_part(payload, index, mask, 1, PLANES)
    elif PLANES[0] == 2 and PLANES[3] >= 0 and PLANES[7] == 0:
        zeros_at = (payload + PLANES[3]).to(tl.pointer_type(tl.uint8))
        zero = tl.load(zeros_at + index, mask=mask, other=0)
    else:
        zero = tl.full([1, 1, 1, 1], 8, tl.uint8)
    return zero


@triton.jit  # type: ignore[untyped-decorator]
def widen(  # type: ignore[no-untyped-def]
    payload, codes, scale, zero, PLANES: tl.constexpr, dtype: tl.constexpr, IN_PAIRS: tl.constexpr
):
    """`[..., bytes]` codes to weights of `dtype`: `[..., bytes]`; of 4 bits `[..., bytes, 2]`."""
    # The scales that PTX multiplies by.
    IS_SAME: tl.constexpr = (PLANES[5] == 1 and dtype == tl.bfloat16) or (
        PLANES[5] == 2 and dtype == tl.float16
    )
    IS_INT4: tl.constexpr = PLANES[0] == 2 and IN_PAIRS and not IS_SAME
    if PLANES[0] == 3 or PLANES[7] != 0 or PLANES[8] == 2 or IS_INT4:
        middle = zero
        if PLANES[8] == 2:
            middle = tl.full([1, 1, 1, 1], 0, tl.uint8)
        weight = open_exactly(codes, middle, PLANES, dtype, IN_PAIRS).to(tl.float32)
        if PLANES[0] == 3:
            weight *= scale.to(tl.float32)
        else:
            weight *= scale.to(tl.float32)[:, :, :, :, None]
        if PLANES[8] == 2 and PLANES[0] == 3:
            weight += zero
        elif PLANES[8] == 2:
            weight += zero[:, :, :, :, None]
        weight = weight.to(dtype)
    elif PLANES[0] == 4:
        factor = scale.to(tl.float32)
        low = _of_table(payload + PLANES[3], codes & 15, IN_PAIRS) * factor
        high = _of_table(payload + PLANES[3], codes >> 4, IN_PAIRS) * factor
        weight = tl.join(low.to(dtype), high.to(dtype))
    elif PLANES[0] == 0:
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
def _of_table(table, number, IN_PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of a table of float32. Triton would copy what its own loads read to shared memory."""
    if IN_PAIRS:
        value = tl.inline_asm_elementwise(
            _TABLE, "=f,l,r", [table, number.to(tl.int32)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        value = tl.load(table.to(tl.pointer_type(tl.float32)) + number.to(tl.int32))
    return value


@triton.jit  # type: ignore[untyped-decorator]
def open_exactly(  # type: ignore[no-untyped-def]
    codes, zero, PLANES: tl.constexpr, dtype: tl.constexpr, IN_PAIRS: tl.constexpr
):
    """As `widen`, but without scales: codes less zeros are numbers of `dtype`."""
    if PLANES[0] == 3:
        if IN_PAIRS:
            weight = tl.inline_asm_elementwise(
                _INT8, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            ).to(dtype)
        else:
            weight = codes.to(tl.int8, bitcast=True).to(dtype)
    elif PLANES[0] == 0:
        if not IN_PAIRS:
            weight = (_open(codes, 0) * 256.0).to(dtype)
        elif dtype == tl.bfloat16:
            weight = tl.inline_asm_elementwise(
                _CODES8_BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            weight = tl.inline_asm_elementwise(
                _CODES8_FLOAT16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            )
    else:
        if not IN_PAIRS:
            less = zero.to(tl.float32)
            low, high = _open(codes & 15, 2) - less, _open(codes >> 4, 2) - less
            low, high = low.to(dtype), high.to(dtype)
        elif dtype == tl.bfloat16:
            minus = (zero.to(tl.int32) | 0xC300).to(tl.int16)
            low, high = tl.inline_asm_elementwise(
                _CODES4_BFLOAT16, "=r,=r,=r,=r,r,r,r", [codes, minus],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            minus = (zero.to(tl.int32) | 0xE400).to(tl.int16)
            low, high = tl.inline_asm_elementwise(
                _CODES4_FLOAT16, "=r,=r,=r,=r,r,r,r", [codes, minus],
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
