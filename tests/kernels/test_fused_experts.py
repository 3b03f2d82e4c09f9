"""Fused experts, in Triton's interpreter where there is no GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import use_experts_implementation

from hotset.cost.tuning import TUNINGS, Tiles
from hotset.experts import compute
from hotset.experts.gating import dynamic_experts
from hotset.experts.weights import IMPLEMENTATION
from hotset.kernels.expert_routing import route_rows
from hotset.kernels.fused_experts import (
    fused_experts,
    gated_up,
    sum_rows,
    tiles_for,
    weighted_down,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_EXPERTS = 5
# Triton's interpreter multiplies the bits of bfloat16 as integers.
DTYPES = [torch.float16, torch.bfloat16 if DEVICE == "cuda" else torch.float32]


def reference(hidden, ids, weights, up, down):  # type: ignore[no-untyped-def]
    """Row by row in float32, rounded where the kernels round."""
    dtype = hidden.dtype
    out = torch.zeros(hidden.shape, device=hidden.device)
    for token, k in ((ids < len(up)) * 1).nonzero().tolist():
        expert = ids[token, k]
        gate, factor = (up[expert].float() @ hidden[token].float()).chunk(2)
        middle = (functional.silu(gate) * factor).to(dtype).float()
        out[token] += (down[expert].float() @ middle * weights[token, k].float()).to(dtype).float()
    return out.to(dtype)


def addresses_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.tensor([part.data_ptr() for part in weight], device=weight.device)


def make(  # type: ignore[no-untyped-def]
    num_tokens, hidden_size, middle_size, top_k, dtype, num_experts=NUM_EXPERTS, num_ids=NUM_EXPERTS
):
    """Hidden states, ids, weights and the two stacked matrices of experts."""
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden_size, device=DEVICE).to(dtype)
    ids = torch.rand(num_tokens, num_ids, device=DEVICE).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, device=DEVICE).to(dtype)
    up = torch.randn(num_experts, 2 * middle_size, hidden_size, device=DEVICE)
    down = torch.randn(num_experts, hidden_size, middle_size, device=DEVICE)
    up, down = (up * hidden_size**-0.5).to(dtype), (down * middle_size**-0.5).to(dtype)
    return x, ids, weights, up, down


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for what a last bit of 16 can make of a sum in another order."""
    difference = (got.float() - expected.float()).norm()
    return bool(difference <= 4e-3 * expected.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "middle_size", "top_k"),
    [(1, 16, 8, 1), (1, 136, 40, 3), (7, 64, 96, 2), (33, 40, 72, 4), (60, 256, 128, 2)],
)
def test_experts_of_any_shape_compute_what_row_by_row_gives(
    num_tokens: int, hidden_size: int, middle_size: int, top_k: int, dtype: torch.dtype
) -> None:
    x, ids, weights, up, down = make(num_tokens, hidden_size, middle_size, top_k, dtype)
    got = fused_experts(x, ids, weights, addresses_of(up), addresses_of(down), middle_size)
    assert got.dtype == dtype
    assert close(got, reference(x, ids, weights, up, down))


@pytest.mark.parametrize(
    "tiles",
    [TUNINGS["cuda"].tiles(rows, 1, shared_bytes=2**31) for rows in (1, 8, 20, 40, 1000)],
    ids=str,
)
def test_all_tiles_compute_the_same(tiles: Tiles) -> None:
    x, ids, weights, up, down = make(70, 144, 136, 3, DTYPES[1])
    expected = reference(x, ids, weights, up, down)
    routing = route_rows(ids.view(-1), NUM_EXPERTS, tiles.block_rows)
    middle, rows = x.new_empty(210, 136), x.new_empty(210, 144)
    gated_up(x, routing, addresses_of(up), middle, top_k=3, tiles=tiles)
    weighted_down(middle, routing, addresses_of(down), weights, rows, tiles=tiles)
    out = torch.empty_like(x)
    sum_rows(rows, ids, out, num_experts=NUM_EXPERTS)
    assert close(out, expected)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float16])
def test_rows_that_are_nobodys_add_nothing(weights_dtype: torch.dtype) -> None:
    x, ids, weights, up, down = make(9, 32, 24, 3, DTYPES[1], num_ids=2 * NUM_EXPERTS)
    ids[0] = NUM_EXPERTS
    weights = weights.to(weights_dtype)
    kept = ids.clone()
    tables = addresses_of(up), addresses_of(down)
    got = fused_experts(x, ids, weights, *tables, 24)
    assert close(got, reference(x, ids, weights, up, down))
    assert got[0].count_nonzero() == 0
    nobody = fused_experts(x, ids.clamp(min=NUM_EXPERTS), weights, *tables, 24)
    assert nobody.count_nonzero() == 0
    assert torch.equal(ids, kept)


def test_bits_do_not_depend_on_where_experts_are() -> None:
    x, ids, weights, up, down = make(12, 48, 32, 2, DTYPES[1])
    expected = fused_experts(x, ids, weights, addresses_of(up), addresses_of(down), 32)
    # Each expert in one piece, gate, up and down adjacent, in another order and apart.
    order = [3, 0, 4, 1, 2]
    size = up[0].numel() + down[0].numel()
    slots = torch.full((2 * NUM_EXPERTS, size), torch.nan, dtype=x.dtype, device=DEVICE)
    for expert, slot in enumerate(order):
        slots[2 * slot] = torch.cat([up[expert].flatten(), down[expert].flatten()])
    up_at = torch.tensor([slots[2 * slot].data_ptr() for slot in order], device=DEVICE)
    down_at = up_at + up[0].nbytes
    assert torch.equal(fused_experts(x, ids, weights, up_at, down_at, 32), expected)


def test_experts_may_be_computed_in_several_calls() -> None:
    x, ids, weights, up, down = make(20, 48, 32, 2, DTYPES[1])
    up_at, down_at = addresses_of(up), addresses_of(down)
    expected = fused_experts(x, ids, weights, up_at, down_at, 32)
    tiles = tiles_for(40, NUM_EXPERTS, x.device)
    routing = route_rows(ids.view(-1), NUM_EXPERTS, tiles.block_rows)
    middle, rows = x.new_full((40, 32), torch.nan), x.new_full((40, 48), torch.nan)
    for here in ([True, False, True, False, False], [False, True, False, True, True]):
        is_here = torch.tensor(here, device=DEVICE)
        gated_up(x, routing, up_at * is_here, middle, top_k=2, tiles=tiles)
        weighted_down(middle, routing, down_at * is_here, weights, rows, tiles=tiles)
    out = torch.empty_like(x)
    sum_rows(rows, ids, out, num_experts=NUM_EXPERTS)
    assert torch.equal(out, expected)


def test_a_token_gets_its_values_whoever_else_is_in_the_batch_and_wherever_it_is() -> None:
    x, ids, weights, up, down = make(13, 64, 32, 2, DTYPES[1])
    tables = addresses_of(up), addresses_of(down)
    expected = fused_experts(x, ids, weights, *tables, 32)
    order = torch.randperm(13, device=DEVICE)
    others = torch.randint(0, NUM_EXPERTS, ids.shape, device=DEVICE)
    for kept in (order[:1], order[:5], order):
        other_ids = others.scatter(0, kept[:, None].expand(-1, 2), ids[kept])
        moved = fused_experts(x[order], other_ids[order], weights[order], *tables, 32)
        places = (order[:, None] == kept).any(1)
        same = torch.equal if DEVICE == "cuda" else close  # numpy's products round by place
        assert same(moved[places], expected[order[places]])


def test_no_tokens_are_none() -> None:
    x, ids, weights, up, down = make(2, 16, 8, 2, DTYPES[1])
    none = fused_experts(x[:0], ids[:0], weights[:0], addresses_of(up), addresses_of(down), 8)
    assert none.shape == (0, 16)


class Layer(nn.Module):
    def __init__(self, config: SimpleNamespace, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.num_experts = len(up)
        self.act_fn = nn.SiLU()
        self.gate_up_proj = nn.Parameter(up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)


def make_layer(up: torch.Tensor, down: torch.Tensor, **kind: bool) -> Any:
    decorated = use_experts_implementation(type("Layer", (Layer,), {}), **kind)
    return decorated(SimpleNamespace(_experts_implementation=IMPLEMENTATION), up, down)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on the CPU are fused too, in the interpreter."""
    monkeypatch.setattr(compute, "has_fused_kernel", lambda weight: True)


@torch.inference_mode()
def test_a_layer_is_fused_in_eager_and_in_compiled_code(any_device: None) -> None:
    x, ids, weights, up, down = make(9, 32, 24, 3, DTYPES[1])
    layer = make_layer(up, down)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(dynamic=True, fullgraph=True, backend=keep)
    def compiled(x, ids, weights):  # type: ignore[no-untyped-def]
        return dynamic_experts(layer, x, ids, weights) + 1

    for num_tokens in (9, 2, 7):
        some = x[:num_tokens], ids[:num_tokens], weights[:num_tokens]
        expected = reference(*some, up, down)
        assert close(dynamic_experts(layer, *some), expected)
        assert close(compiled(*some) - 1, expected)
    assert len(graphs) == 1  # whatever the number of tokens
    assert "hotset.resident_experts" in graphs[0].code


@torch.inference_mode()
def test_a_layer_whose_weights_have_moved_is_computed_from_where_they_are(any_device: None) -> None:
    x, ids, weights, up, down = make(4, 32, 24, 2, DTYPES[1])
    layer = make_layer(up.clone(), down.clone())
    expected = dynamic_experts(layer, x, ids, weights)
    layer.gate_up_proj = nn.Parameter(2 * up, requires_grad=False)
    layer.down_proj = nn.Parameter(3 * down, requires_grad=False)
    moved = dynamic_experts(layer, x, ids, weights)
    assert close(moved, reference(x, ids, weights, 2 * up, 3 * down))
    assert not close(moved, expected)
