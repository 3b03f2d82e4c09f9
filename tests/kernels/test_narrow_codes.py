"""The PTX that opens narrow weights on a GPU, carried out here instruction by instruction."""

import re
from collections.abc import Iterator

import pytest
import torch

from hotset.experts.narrow import NarrowLayout
from hotset.kernels import narrow_codes
from hotset.weight_format import MXFP4, WeightFormat

ALL_BYTES = torch.arange(256)
MASK = 0xFFFFFFFF


class Registers:
    """Each is `[N]` int64, of 32 bits, for N cases at once."""

    def __init__(self, **values: torch.Tensor) -> None:
        self.values = values

    def read(self, name: str) -> torch.Tensor:
        if name[0].isdigit():
            return torch.tensor(int(name, 0))
        return self.values[name.lstrip("$")]

    def run(self, text: str) -> None:
        for name, kind, target, *sources in instructions(text):
            self.values[target.lstrip("$")] = self.result(name, kind, *map(self.read, sources))

    def result(self, name: str, kind: str, *s: torch.Tensor) -> torch.Tensor:
        if name == "mov":
            return s[0]
        if name == "and":
            return s[0] & s[1]
        if name == "xor":
            return s[0] ^ s[1]
        if name == "shr":
            return s[0] >> s[1]
        if name == "mul":
            return s[0] * s[1] & MASK
        if name == "lop3":
            assert s[3] == 0xEA
            return (s[0] & s[1]) | s[2]
        if name == "prmt":
            chosen = [int(s[2]) >> 4 * i & 15 for i in range(4)]
            assert max(chosen) < 8
            both = [s[c // 4] >> 8 * (c % 4) & 255 for c in chosen]
            picked = [(each + 0 * s[0]) << 8 * i for i, each in enumerate(both)]
            return picked[0] | picked[1] | picked[2] | picked[3]
        assert name == "fma"
        dtype = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}[kind]
        out = torch.zeros_like(s[0] + s[1])
        for shift in (0, 16):
            a, b, c = (as_floats(each >> shift, dtype) for each in s)
            rounded = (a.double() * b.double() + c.double()).float().to(dtype)
            out |= (rounded.view(torch.int16).long() & 0xFFFF) << shift
        return out


def as_floats(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bits = bits & 0xFFFF
    return torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16).view(dtype)


def instructions(text: str) -> Iterator[list[str]]:
    for line in re.findall(r"(\w[^;{}]*);", text):
        if not line.startswith((".reg", "reg")):
            name, *rest = re.split(r"[\s,]+", line)
            yield [name.split(".")[0], name.split(".")[-1], *rest]


def opened(text: str, outputs: int, dtype: torch.dtype, **more: torch.Tensor) -> torch.Tensor:
    """`[256, outputs * 2]` of all bytes, each four times in a word."""
    word = ALL_BYTES * 0x01010101
    registers = Registers(**{str(outputs): word}, **more)
    registers.run(text)
    found = [registers.values[str(i)] for i in range(outputs)]
    return torch.stack([as_floats(r >> s, dtype) for r in found for s in (0, 16)], 1)


def widened(form: WeightFormat, scale: float, dtype: torch.dtype, zero: int = 8) -> torch.Tensor:
    """`[256, 2]` or `[256, 1]` by the reference."""
    layout = NarrowLayout((256, 64), (64, 64), form)
    payloads = torch.zeros(1, layout.payload_bytes, dtype=torch.uint8)
    codes, scales, zeros = layout.matrices[0].views(payloads)
    codes.copy_(ALL_BYTES.byte().view(1, 256, 1).expand(codes.shape))
    if form.scale == "e8m0":
        scales.fill_(int(scale))
    else:
        scales.fill_(scale)
    if zeros is not None:
        zeros.fill_(zero)
    return layout.widen(0, payloads, dtype)[0][:, : 8 // form.code_bits]


def check_pairs(got: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """`[256, 8]`: four low codes and four high ones, of the scales of `expected`."""
    low, high = (torch.stack([each[:, part] for each in expected], 1) for part in (0, 1))
    assert torch.equal(got.view(torch.int16), torch.cat([low, high], 1).view(torch.int16))


def halves(bits: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Four numbers of 16 bits in two registers."""
    return torch.tensor(bits[0] | bits[1] << 16), torch.tensor(bits[2] | bits[3] << 16)


@pytest.mark.parametrize("exponent", range(129))
def test_e2m1_opens_to_the_bits_of_the_reference_with_all_scales(exponent: int) -> None:
    exponents = [exponent, 128 - exponent, exponent // 2, 64]
    first, second = halves([each + 126 << 7 for each in exponents])
    got = opened(narrow_codes._E2M1.value, 4, torch.bfloat16, **{"5": first, "6": second})
    check_pairs(got, [widened(MXFP4, each, torch.bfloat16) for each in exponents])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", range(16))
def test_int4_opens_to_the_bits_of_the_reference(dtype: torch.dtype, zero: int) -> None:
    is_half = dtype == torch.float16
    text = narrow_codes._INT4_FLOAT16 if is_half else narrow_codes._INT4_BFLOAT16
    name = str(dtype).removeprefix("torch.")
    form = WeightFormat("int4", name, 1, 32, has_zeros=True)  # type: ignore[arg-type]
    zeros = [zero, 15 - zero, 8, 0]
    minus = halves([each | (0xE400 if is_half else 0xC300) for each in zeros])
    for chosen in ((0.0, 1.0, -0.01171875, 3.1415), (1e-6, 0.000976, 7.1e-5, 1000.0)):
        exact = torch.tensor(chosen, dtype=dtype)
        scales = halves([bits & 0xFFFF for bits in exact.view(torch.int16).tolist()])
        registers = dict(zip("5678", (*scales, *minus), strict=True))
        got = opened(text.value, 4, dtype, **registers)
        expected = [
            widened(form, float(scale), dtype, each) + 0.0
            for scale, each in zip(exact, zeros, strict=True)
        ]
        check_pairs(got + 0.0, expected)  # zeros may differ in their sign, which no sum tells


def test_e4m3_opens_to_its_value_over_256() -> None:
    got = opened(narrow_codes._E4M3.value, 2, torch.float16)
    is_number = ALL_BYTES & 127 != 127
    values = ALL_BYTES.byte().view(torch.float8_e4m3fn).float()[is_number]
    assert torch.equal(got.float()[is_number] * 256, values.unsqueeze(1).expand(-1, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_e4m3_opens_to_its_value(dtype: torch.dtype) -> None:
    is_half = dtype == torch.float16
    text = narrow_codes._CODES8_FLOAT16 if is_half else narrow_codes._CODES8_BFLOAT16
    got = opened(text.value, 2, dtype)
    is_number = ALL_BYTES & 127 != 127
    values = ALL_BYTES.byte().view(torch.float8_e4m3fn).float()[is_number]
    assert torch.equal(got.float()[is_number], values.unsqueeze(1).expand(-1, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", range(16))
def test_int4_opens_to_its_code_less_the_zero(dtype: torch.dtype, zero: int) -> None:
    is_half = dtype == torch.float16
    text = narrow_codes._CODES4_FLOAT16 if is_half else narrow_codes._CODES4_BFLOAT16
    zeros = [zero, 15 - zero, 8, 0]
    minus = halves([each | (0xE400 if is_half else 0xC300) for each in zeros])
    got = opened(text.value, 4, dtype, **dict(zip("56", minus, strict=True)))
    codes = torch.stack([ALL_BYTES & 15, ALL_BYTES >> 4], 1).unsqueeze(2)  # [256, 2, 1]
    expected = (codes - torch.tensor(zeros)).flatten(1)
    assert torch.equal(got.float(), expected.float())


def test_int8_opens_to_its_value() -> None:
    got = opened(narrow_codes._INT8.value, 2, torch.float16)
    values = ALL_BYTES.byte().view(torch.int8).float()
    assert torch.equal(got.float(), values.unsqueeze(1).expand(-1, 4))


def test_inputs_lie_in_the_order_of_the_columns() -> None:
    from hotset.kernels.narrow_launch import in_runs

    got = in_runs(torch.arange(2 * 160.0).view(2, 160))
    assert got.shape == (2, 192) and int((got[1] == 0).sum()) == 32
    places = [in_order_of(column) for column in range(160)]
    assert torch.equal(got[:, places], torch.arange(2 * 160.0).view(2, 160))


def in_order_of(column: int) -> int:
    """`in_order`, for the units of threads: bits t t s h e n of a column as n s h t t e."""
    run, bits = divmod(column, 64)
    t, s, h, e, n = bits >> 4, bits >> 3 & 1, bits >> 2 & 1, bits >> 1 & 1, bits & 1
    return run * 64 + n * 32 + s * 16 + h * 8 + t * 2 + e
