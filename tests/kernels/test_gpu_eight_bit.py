"""8-bit weights with 8-bit inputs on an NVIDIA GPU, in the sizes of published models."""

from dataclasses import replace

import pytest
import torch
from test_narrow_kernels import activate, layout_of

from hotset.experts.random_payloads import random_payloads
from hotset.kernels.expert_routing import route_rows
from hotset.kernels.narrow_experts import (
    empty_middle,
    gated_up,
    middle_inputs,
    narrow_experts,
    weighted_down,
)
from hotset.kernels.narrow_forms import Gate
from hotset.kernels.narrow_launch import as_inputs, narrow_tiles_for
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
    tiles = narrow_tiles_for(ids.numel(), NUM_EXPERTS, form, x.device)
    routing = route_rows(ids.view(-1), NUM_EXPERTS, tiles.block_rows)
    middle = empty_middle(x, ids.numel(), layout)
    inputs = as_inputs(x, form)
    of_experts = routing, addresses, layout
    gated_up(inputs, *of_experts, Gate(), None, middle, top_k=TOP_K, tiles=tiles)
    rows = x.new_empty(ids.numel(), hidden)
    of_middle = middle_inputs(middle, form)
    weighted_down(of_middle, *of_experts, None, weights, rows, tiles=tiles)
    assert inputs.values.dtype == of_middle.values.dtype == torch.float8_e4m3fn

    # Product by product: a middle that differs in its last bit is rounded to another code.
    up, down = layout.matrices
    places = routing.rows.long()
    experts = ids.flatten()[places]
    expected_middle, expected = middle.float(), torch.empty_like(rows, dtype=torch.float32)
    for expert in range(NUM_EXPERTS):
        mine = experts == expert
        both = reference_product(x[places[mine] // TOP_K], payloads[expert], up)
        expected_middle[mine] = activate(both, Gate())
        products = reference_product(middle[mine], payloads[expert], down)
        expected[places[mine]] = products * weights.flatten()[places[mine]].float().unsqueeze(1)
    assert (middle - expected_middle).norm() < 5e-3 * expected_middle.norm()
    assert (rows - expected).norm() < 5e-3 * expected.norm()
    got = narrow_experts(x, ids, weights, addresses, layout, Gate())
    sums = rows.view(num_tokens, TOP_K, hidden).float().sum(1)
    assert (got - sums).norm() < 5e-3 * sums.norm()


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
