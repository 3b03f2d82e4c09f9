"""Experts in few bits, computed as they lie, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch.nn import functional

from hotset.experts.narrow import NarrowLayout
from hotset.experts.random_payloads import random_payloads
from hotset.kernels.narrow_experts import narrow_experts
from hotset.kernels.narrow_forms import Gate, can_read
from hotset.weight_format import FP8_BLOCK, FP8_ROW, INT4, MXFP4, NVFP4, WeightFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bits of bfloat16 as integers.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FORMS = [
    MXFP4,
    NVFP4,
    FP8_BLOCK,
    FP8_ROW,
    INT4,
    WeightFormat("e4m3", "float32", None, None),
    WeightFormat("int4", "float16", 1, 32, has_zeros=True),
    WeightFormat("int4", "float32", 1, None),
    WeightFormat("int8", "float32", 1, None),
    WeightFormat("int8", "bfloat16", 1, 32),
]
SILU, GPT_OSS = Gate(), Gate(alpha=1.702, limit=7.0)
NUM_EXPERTS = 4


def addresses_of(payloads: torch.Tensor) -> torch.Tensor:
    return torch.tensor([row.data_ptr() for row in payloads], device=DEVICE)


def activate(rows: torch.Tensor, gate: Gate) -> torch.Tensor:
    if not gate.alpha:
        first, factor = rows.chunk(2, -1)
        return functional.silu(first) * factor
    first, factor = rows[..., ::2].clamp(max=gate.limit), rows[..., 1::2]
    factor = factor.clamp(-gate.limit, gate.limit)
    return (factor + 1) * first * torch.sigmoid(gate.alpha * first)


def layout_of(form: WeightFormat, gate: Gate, hidden: int, middle: int) -> NarrowLayout:
    up = (2 * middle, hidden) if gate.alpha else (2, middle, hidden)
    return NarrowLayout(up, (hidden, middle), form)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.scale}")
@pytest.mark.parametrize(("hidden", "middle"), [(64, 96), (160, 32)])
@pytest.mark.parametrize("num_tokens", [1, 21])
def test_narrow_experts_compute_what_their_widened_matrices_give(
    form: WeightFormat, hidden: int, middle: int, num_tokens: int
) -> None:
    gate = GPT_OSS if form == MXFP4 else SILU
    layout = layout_of(form, gate, hidden, middle)
    assert can_read(form)
    payloads = random_payloads(layout, NUM_EXPERTS, std=0.1).to(DEVICE)
    up, down = layout.dequantise(payloads, DTYPE)
    biases = torch.randn(NUM_EXPERTS, 2 * middle), torch.randn(NUM_EXPERTS, hidden)
    biases = tuple(bias.to(DEVICE, DTYPE) for bias in biases)  # type: ignore[assignment]
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(DTYPE)
    ids = torch.rand(num_tokens, NUM_EXPERTS + 1, device=DEVICE).topk(2).indices  # one is no expert
    weights = torch.rand(num_tokens, 2, device=DEVICE).to(DTYPE)

    has_bias = bool(gate.alpha)
    got = narrow_experts(
        x, ids, weights, addresses_of(payloads), layout, gate, biases=biases if has_bias else None
    )

    expected = torch.zeros(x.shape, device=DEVICE)
    for token, k in (ids < NUM_EXPERTS).nonzero().tolist():
        expert = int(ids[token, k])
        rows = up[expert].float() @ x[token].float() + has_bias * biases[0][expert].float()
        rows = activate(rows, gate).to(DTYPE).float()
        rows = down[expert].float() @ rows + has_bias * biases[1][expert].float()
        expected[token] += (rows * weights[token, k].float()).to(DTYPE).float()
    error = (got.float() - expected).norm() / expected.norm()
    assert error < (4e-3 if torch.float32 != DTYPE else 1e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.scale}")
def test_weights_are_widened_to_the_bits_of_the_reference(form: WeightFormat) -> None:
    """All 256 bytes and many scales: a row with a single one picks a column of the down matrix."""
    hidden, middle = 128, 32
    layout = layout_of(form, GPT_OSS, hidden, middle)
    payloads = random_payloads(layout, 1, std=0.1).to(DEVICE)
    codes, _, zeros = layout.matrices[0].views(payloads)
    codes.zero_()  # e2m1 and e4m3 zeros: the biases alone decide the middle
    if zeros is not None:
        zeros.zero_()
    elif form.code == "int4":
        codes.fill_(0x88)
    codes = layout.matrices[1].views(payloads)[0]
    all_bytes = torch.arange(codes.numel(), device=DEVICE).remainder(256).byte().view(codes.shape)
    if form.code == "e4m3":
        all_bytes = all_bytes.masked_fill(all_bytes & 127 == 127, 56)
    codes.copy_(all_bytes)
    _, down = layout.dequantise(payloads, DTYPE)

    # One payload under as many numbers as it has columns. With a gate that is far above 0 and an up
    # of 0, the middle of a column is its gate's bias: each number picks one.
    bias = torch.zeros(middle, middle, 2, device=DEVICE, dtype=DTYPE)
    bias[:, :, 0] = 1024.0 * torch.eye(middle, device=DEVICE, dtype=DTYPE)
    none = torch.zeros(middle, hidden, device=DEVICE, dtype=DTYPE)
    ids = torch.arange(middle, device=DEVICE).unsqueeze(1)
    ones = torch.ones(middle, 1, device=DEVICE, dtype=DTYPE)
    gate = Gate(alpha=1.0, limit=2048.0)
    got = narrow_experts(
        none, ids, ones, addresses_of(payloads).expand(middle).contiguous(), layout, gate,
        biases=(bias.flatten(1), none),
    )  # fmt: skip
    assert torch.equal(got, down[0].t() * 1024.0)


def test_passes_leave_out_experts_without_an_address() -> None:
    layout = layout_of(MXFP4, SILU, 64, 32)
    payloads = random_payloads(layout, NUM_EXPERTS, std=0.1).to(DEVICE)
    table = addresses_of(payloads)
    x = torch.randn(5, 64, device=DEVICE).to(DTYPE)
    ids = torch.rand(5, NUM_EXPERTS, device=DEVICE).topk(2).indices
    weights = torch.rand(5, 2, device=DEVICE).to(DTYPE)
    at_once = narrow_experts(x, ids, weights, table, layout, SILU)
    is_first = torch.arange(NUM_EXPERTS, device=DEVICE) < 2
    passes = torch.stack([table * is_first, table * ~is_first])
    called: list[int] = []
    got = narrow_experts(x, ids, weights, passes, layout, SILU, before_pass=called.append)
    assert torch.equal(got, at_once) and called == [0, 1]
