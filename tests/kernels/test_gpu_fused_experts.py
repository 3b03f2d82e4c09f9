"""Fused experts of Qwen3-30B-A3B's shape on an NVIDIA GPU: run these there with `pytest -m gpu`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hotset.experts import compute
from hotset.experts.compute import is_fused
from hotset.experts.gating import dynamic_experts
from hotset.experts.weights import IMPLEMENTATION, experts_of

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
NUM_EXPERTS, HIDDEN, MIDDLE, TOP_K = 128, 2048, 768, 8
SIZES = (1, 3, 16, 64, 256, 2000, 8192)


@pytest.fixture(scope="module")
def layer() -> Iterator[Any]:
    config = Qwen3MoeConfig(
        num_experts=NUM_EXPERTS,
        hidden_size=HIDDEN,
        moe_intermediate_size=MIDDLE,
        num_experts_per_tok=TOP_K,
        hidden_act="silu",
    )
    config._experts_implementation = IMPLEMENTATION
    with torch.device("cuda"):
        made: nn.Module = Qwen3MoeExperts(config).to(torch.bfloat16)
    made.requires_grad_(False)
    torch.manual_seed(0)
    for weight in made.parameters():
        weight.normal_(0, HIDDEN**-0.5)
    experts_of(made)  # as an engine does before anything is compiled
    yield made
    del made
    torch.cuda.empty_cache()


def routed(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some experts are busier than others, as in real models."""
    generator = torch.Generator("cuda").manual_seed(1000 * num_tokens + seed)
    x = torch.randn(num_tokens, HIDDEN, device="cuda", generator=generator).to(torch.bfloat16)
    scores = torch.randn(num_tokens, NUM_EXPERTS, device="cuda", generator=generator)
    scores += torch.linspace(-1, 1, NUM_EXPERTS, device="cuda")
    weights, ids = scores.softmax(-1).topk(TOP_K)
    return x, ids, (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)


def fused(layer: Any, num_rows: int) -> bool:
    experts = experts_of(layer)
    return is_fused(experts, experts.weights, num_rows)


def unfused(layer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """The same layer by PyTorch's grouped products."""

    def forward(*step: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(compute, "FUSED_MOST_ROWS_PER_EXPERT", 0)
            assert not fused(layer, step[1].numel())
            return dynamic_experts(layer, *step)

    return forward


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("num_tokens", SIZES)
@torch.inference_mode()
def test_fused_experts_compute_what_grouped_products_do(
    layer: Any, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = routed(num_tokens)
    assert fused(layer, num_tokens * TOP_K)
    got = dynamic_experts(layer, *step)
    assert difference(got, unfused(layer, monkeypatch)(*step)) < 1e-2  # it rounds four times more


@pytest.mark.parametrize("num_tokens", SIZES)
@torch.inference_mode()
def test_bits_depend_on_neither_the_run_nor_the_place_in_the_batch(
    layer: Any, num_tokens: int
) -> None:
    x, ids, weights = routed(num_tokens)
    expected = dynamic_experts(layer, x, ids, weights)
    assert torch.equal(dynamic_experts(layer, x, ids, weights), expected)
    order = torch.randperm(num_tokens, device="cuda")
    moved = dynamic_experts(layer, x[order], ids[order], weights[order])
    assert torch.equal(moved, expected[order])


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_a_recorded_step_follows_the_router(layer: Any, num_tokens: int, compiled: bool) -> None:
    def chain(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + dynamic_experts(layer, x, ids, weights)
        return x

    run = torch.compile(chain, dynamic=True, fullgraph=True) if compiled else chain
    static = routed(num_tokens)
    run(*static)  # compiles, and loads kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*static)
    for turn in range(4):
        step = routed(num_tokens, seed=turn + 1)
        if turn == 3:  # all rows to the same experts
            step[1][:] = torch.arange(TOP_K, device="cuda") * 3
        for target, source in zip(static, step, strict=True):
            target.copy_(source)
        graph.replay()
        if not compiled:
            assert torch.equal(out, chain(*step))
        assert difference(out, chain(*step)) < 1e-2


@torch.inference_mode()
def test_a_table_of_addresses_may_be_made_while_a_graph_is_recorded(layer: Any) -> None:
    step = routed(5)
    dynamic_experts(layer, *step)  # loads kernels
    compute._tables.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dynamic_experts(layer, *step)
    assert not compute._tables
    graph.replay()
    assert torch.equal(out, dynamic_experts(layer, *step))


@pytest.mark.parametrize("num_tokens", [1, 40, 600])
@torch.inference_mode()
def test_rows_of_other_ranks_add_nothing(layer: Any, num_tokens: int) -> None:
    x, ids, weights = routed(num_tokens)
    is_mine = torch.rand(ids.shape, device="cuda") < 0.5
    mine = torch.where(is_mine, ids, NUM_EXPERTS)
    others = torch.where(is_mine, NUM_EXPERTS, ids)
    both = sum(dynamic_experts(layer, x, part, weights).float() for part in (mine, others))
    assert difference(both, dynamic_experts(layer, x, ids, weights)) < 1e-2
    nobody = torch.full_like(ids, NUM_EXPERTS)
    assert dynamic_experts(layer, x, nobody, weights).count_nonzero() == 0


@pytest.mark.parametrize("num_tokens", [1, 256, 2000])
@torch.inference_mode()
def test_float16_is_computed_and_recorded_too(layer: Any, num_tokens: int) -> None:
    half = Qwen3MoeExperts(layer.config).to("cuda", torch.float16).requires_grad_(False)
    half.load_state_dict(layer.state_dict())
    x, ids, weights = routed(num_tokens)
    x, weights = x.half(), weights.half()
    expected = dynamic_experts(layer, x.to(torch.bfloat16), ids, weights.to(torch.bfloat16))
    dynamic_experts(half, x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dynamic_experts(half, x, ids, weights)
    graph.replay()
    assert difference(out, expected) < 1e-2
