"""8-bit weights with 8-bit inputs, in Triton's interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch
from test_narrow_kernels import DEVICE, DTYPE, NUM_EXPERTS, activate, addresses_of, layout_of

from hotset.experts.random_payloads import random_payloads
from hotset.kernels import narrow_launch
from hotset.kernels.eight_bit import round_rows
from hotset.kernels.narrow_experts import narrow_experts
from hotset.kernels.narrow_forms import Gate, can_read
from hotset.kernels.narrow_linear import narrow_linear
from hotset.linear.eight_bit import reference_product, rounded_rows
from hotset.linear.quant_linear import quant_matrix, random_payload
from hotset.weight_format import FP8_BLOCK, FP8_ROW, INT4_128, WeightFormat

# Interpreted, blocks of 128 take long; those of 64 are cut and merged in the same way.
FORMS = [
    replace(FP8_BLOCK, rows=64, columns=64, input_bits=8),
    replace(FP8_ROW, input_bits=8),
    WeightFormat("e4m3", "float32", None, None, input_bits=8),
]


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter forgets to carry where it rounds to 8 bits."""
    if DEVICE == "cpu":
        monkeypatch.setattr(narrow_launch, "round_rows", rounded_rows)


@pytest.mark.parametrize("group", [64, 128, None])
@pytest.mark.parametrize("num_columns", [128, 320])
def test_rows_are_rounded_to_the_bits_of_the_reference(group: int | None, num_columns: int) -> None:
    x = torch.randn(5, num_columns, device=DEVICE)
    if DEVICE == "cpu":  # numbers that need no rounding
        x = (x * 50).to(torch.float8_e4m3fn).float()
        x[:, ::64] = 448.0
    x[1] = 0
    x[3] *= 2.0**-60
    codes, scales = round_rows(x, group)
    expected, expected_scales = rounded_rows(x, group)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.float(), expected.float())
    assert codes.shape == x.shape and round_rows(x[:0], group)[0].shape == (0, num_columns)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(("hidden", "middle"), [(128, 64), (192, 160)])  # the latter end in a part
@pytest.mark.parametrize("num_tokens", [1, 21])
def test_experts_multiply_rounded_rows(
    form: WeightFormat, hidden: int, middle: int, num_tokens: int
) -> None:
    gate = Gate()
    layout = layout_of(form, gate, hidden, middle)
    assert can_read(form)
    payloads = random_payloads(layout, NUM_EXPERTS, std=0.1).to(DEVICE)
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(DTYPE)
    ids = torch.rand(num_tokens, NUM_EXPERTS + 1, device=DEVICE).topk(2).indices  # one is no expert
    weights = torch.rand(num_tokens, 2, device=DEVICE).to(DTYPE)

    got = narrow_experts(x, ids, weights, addresses_of(payloads), layout, gate)

    expected = torch.zeros(x.shape, device=DEVICE)
    for token, k in (ids < NUM_EXPERTS).nonzero().tolist():
        payload = payloads[ids[token, k]]
        up, down = layout.matrices
        row = x[token : token + 1]
        rows = reference_product(row, payload, up)
        rows = activate(rows, gate).to(DTYPE)
        rows = reference_product(rows, payload, down)
        expected[token] += (rows[0] * weights[token, k].float()).to(DTYPE).float()
    error = (got.float() - expected).norm() / expected.norm()
    # A middle that differs by the order of sums is rounded to another code now and then.
    assert error < (1e-2 if torch.float32 != DTYPE else 2e-3)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("shape", [(96, 128), (200, 160)])  # the latter ends in parts of blocks
def test_linear_layers_multiply_rounded_rows(form: WeightFormat, shape: tuple[int, int]) -> None:
    matrix = quant_matrix(form, shape)
    payload = random_payload(matrix, torch.Generator().manual_seed(0)).to(DEVICE)
    for num_rows in (1, 21):
        x = torch.randn(num_rows, shape[1], device=DEVICE).to(DTYPE)
        expected = reference_product(x, payload, matrix)
        got = narrow_linear(x, payload, matrix)
        torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-3)


def test_a_token_has_the_same_bits_in_any_batch_and_pass() -> None:
    layout = layout_of(FORMS[0], Gate(), 128, 64)
    payloads = random_payloads(layout, NUM_EXPERTS, std=0.1).to(DEVICE)
    table = addresses_of(payloads)
    x = torch.randn(7, 128, device=DEVICE).to(DTYPE)
    ids = torch.rand(7, NUM_EXPERTS, device=DEVICE).topk(2).indices
    weights = torch.rand(7, 2, device=DEVICE).to(DTYPE)
    whole = narrow_experts(x, ids, weights, table, layout, Gate())
    is_first = torch.arange(NUM_EXPERTS, device=DEVICE) < 2
    passes = torch.stack([table * is_first, table * ~is_first])
    assert torch.equal(narrow_experts(x, ids, weights, passes, layout, Gate()), whole)
    x[3:] = torch.nan  # a neighbour's values are not read
    alone = narrow_experts(x, ids, weights, table, layout, Gate())
    assert torch.equal(alone[:3], whole[:3])


def test_formats_whose_inputs_cannot_be_rounded_are_not_read() -> None:
    assert not can_read(replace(INT4_128, input_bits=8))
    assert not can_read(WeightFormat("e4m3", "e8m0", 1, 32, input_bits=8))
