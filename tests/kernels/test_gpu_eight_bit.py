"""8-bit weights with 8-bit inputs on an NVIDIA GPU, in the sizes of published models."""

from dataclasses import replace

import pytest
import torch
from test_narrow_kernels import activate, layout_of

from hotset.experts.random_payloads import random_payloads
from hotset.kernels.narrow_experts import narrow_experts
from hotset.kernels.narrow_forms import Gate
from hotset.linear.eight_bit import reference_product
from hotset.weight_format import FP8_BLOCK, FP8_ROW, WeightFormat

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
NUM_EXPERTS, TOP_K = 16, 4
FORMS = [replace(FP8_BLOCK, input_bits=8), replace(FP8_ROW, input_bits=8)]


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 2048])
@pytest.mark.parametrize(("hidden", "middle"), [(2048, 768), (2048, 1408), (2880, 2880)])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@torch.inference_mode()
def test_experts_compute_what_the_reference_does(
    form: WeightFormat, hidden: int, middle: int, num_tokens: int
) -> None:
    layout = layout_of(form, Gate(), hidden, middle)
    generator = torch.Generator().manual_seed(0)
    payloads = random_payloads(layout, NUM_EXPERTS, std=0.02, generator=generator).cuda()
    addresses = payloads.data_ptr() + layout.payload_bytes * torch.arange(NUM_EXPERTS).cuda()
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
    scores = torch.randn(num_tokens, NUM_EXPERTS, device="cuda")
    weights, ids = scores.softmax(-1).topk(TOP_K)
    weights = weights.bfloat16()
    got = narrow_experts(x, ids, weights, addresses, layout, Gate())
    expected = torch.zeros(x.shape, device="cuda")
    up, down = layout.matrices
    for expert in range(NUM_EXPERTS):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        rows = reference_product(x[tokens], payloads[expert], up)
        rows = activate(rows, Gate()).bfloat16()
        rows = reference_product(rows, payloads[expert], down)
        expected.index_add_(0, tokens, rows * weights[tokens, places].float().unsqueeze(1))
    error = (got.float() - expected).norm() / expected.norm()
    assert error < 1e-2


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@torch.inference_mode()
def test_replays_give_what_launches_do(form: WeightFormat) -> None:
    layout = layout_of(form, Gate(), 2048, 768)
    payloads = random_payloads(layout, NUM_EXPERTS, std=0.02).cuda()
    addresses = payloads.data_ptr() + layout.payload_bytes * torch.arange(NUM_EXPERTS).cuda()
    x = torch.randn(16, 2048, device="cuda").bfloat16()
    ids = torch.rand(16, NUM_EXPERTS, device="cuda").topk(TOP_K).indices
    weights = torch.rand(16, TOP_K, device="cuda").bfloat16()
    step = x, ids, weights, addresses, layout, Gate()
    expected = narrow_experts(*step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = narrow_experts(*step)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
