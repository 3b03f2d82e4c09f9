"""Kernels of narrow experts on an NVIDIA GPU, in the sizes of published models: `pytest -m gpu`."""

import functools

import pytest
import torch
from test_narrow_kernels import GPT_OSS, SILU, activate, layout_of

from hotset.experts.narrow import NarrowLayout
from hotset.experts.random_payloads import random_payloads
from hotset.kernels import narrow_experts as kernels
from hotset.kernels.narrow_forms import Gate
from hotset.weight_format import FP8_BLOCK, FP8_ROW, INT4, INT4_128, MXFP4, NVFP4, WeightFormat

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
NUM_EXPERTS, TOP_K = 16, 4
Layer = tuple[WeightFormat, Gate, int, int, torch.dtype]
LAYERS: dict[str, Layer] = {
    "mxfp4": (MXFP4, GPT_OSS, 2880, 2880, torch.bfloat16),
    "mxfp4 half": (MXFP4, GPT_OSS, 2880, 2880, torch.float16),
    "nvfp4": (NVFP4, SILU, 2048, 768, torch.bfloat16),
    "fp8 blocks": (FP8_BLOCK, SILU, 2048, 768, torch.bfloat16),
    "fp8 blocks, ragged": (FP8_BLOCK, SILU, 2048, 1408, torch.bfloat16),
    "fp8 rows": (FP8_ROW, SILU, 2048, 768, torch.bfloat16),
    "int4 rounded": (INT4, SILU, 2048, 768, torch.bfloat16),
    "int4": (INT4_128, SILU, 2048, 768, torch.bfloat16),
    "awq": (WeightFormat("int4", "float16", 1, 128, True), SILU, 2048, 768, torch.float16),
    "awq in bfloat16": (
        WeightFormat("int4", "float16", 1, 128, True), SILU, 2048, 768, torch.bfloat16,
    ),
    "int8 rows": (WeightFormat("int8", "float32", 1, None), SILU, 2048, 768, torch.bfloat16),
    "gptq": (WeightFormat("int4", "float16", 1, 32), SILU, 2048, 1408, torch.float16),
}  # fmt: skip


@functools.cache
def payloads_of(name: str) -> tuple[NarrowLayout, torch.Tensor, torch.Tensor]:
    form, gate, hidden, middle, _ = LAYERS[name]
    layout = layout_of(form, gate, hidden, middle)
    generator = torch.Generator().manual_seed(0)
    payloads = random_payloads(layout, NUM_EXPERTS, std=0.1, generator=generator).cuda()
    steps = layout.payload_bytes * torch.arange(NUM_EXPERTS, device="cuda")
    return layout, payloads, payloads.data_ptr() + steps


def inputs(name: str, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Rows, ids, weights and biases of both products."""
    _, _, hidden, middle, dtype = LAYERS[name]
    make = functools.partial(torch.randn, device="cuda", generator=seeded(num_tokens))
    scores = make(num_tokens, NUM_EXPERTS)
    weights, ids = scores.softmax(-1).topk(TOP_K)
    x = make(num_tokens, hidden).to(dtype)
    biases = make(NUM_EXPERTS, 2 * middle).to(dtype), make(NUM_EXPERTS, hidden).to(dtype)
    return x, ids, weights.to(dtype), *biases


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def compute(name: str, num_tokens: int) -> torch.Tensor:
    layout, _, addresses = payloads_of(name)
    gate = LAYERS[name][1]
    x, ids, weights, *biases = inputs(name, num_tokens)
    return kernels.narrow_experts(
        x, ids, weights, addresses, layout, gate,
        biases=(biases[0], biases[1]) if gate.alpha else None,
    )  # fmt: skip


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 2048])
@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_kernels_compute_what_widened_experts_give(name: str, num_tokens: int) -> None:
    layout, payloads, _ = payloads_of(name)
    gate, dtype = LAYERS[name][1], LAYERS[name][4]
    x, ids, weights, up_bias, down_bias = inputs(name, num_tokens)
    got = compute(name, num_tokens)
    expected = torch.zeros(x.shape, device="cuda")
    for expert in range(NUM_EXPERTS):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        (up,), (down,) = layout.dequantise(payloads[expert : expert + 1], dtype)
        rows = x[tokens].float() @ up.float().t() + bool(gate.alpha) * up_bias[expert].float()
        rows = activate(rows, gate).to(dtype).float() @ down.float().t()
        rows += bool(gate.alpha) * down_bias[expert].float()
        expected.index_add_(0, tokens, rows * weights[tokens, places].float().unsqueeze(1))
    error = (got.float() - expected).norm() / expected.norm()
    assert error < 1e-2


@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_codes_opened_in_pairs_give_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_tokens in (3, 200):
        got = compute(name, num_tokens)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "opens_in_pairs", lambda *_: False)
            assert torch.equal(compute(name, num_tokens), got)


@pytest.mark.parametrize("name", ["mxfp4", "fp8 blocks", "int4"])
@torch.inference_mode()
def test_replays_give_what_launches_do(name: str) -> None:
    layout, _, addresses = payloads_of(name)
    gate = LAYERS[name][1]
    x, ids, weights, *biases = inputs(name, 16)
    pair = (biases[0], biases[1]) if gate.alpha else None
    step = x, ids, weights, addresses, layout, gate
    expected = kernels.narrow_experts(*step, biases=pair)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.narrow_experts(*step, biases=pair)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
