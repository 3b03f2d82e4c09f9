"""Which layers the fused kernels compute, and where they find their weights."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import run
from tiny_models import HAS_POST_EXPERT_NORM, make_model
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from hotset.engine.build import build_engine
from hotset.experts import compute
from hotset.experts.compute import (
    FUSED_MOST_ROWS_PER_EXPERT,
    address_table,
    has_fused_kernel,
    is_fused,
)
from hotset.experts.gating import dynamic_experts, pack_experts, use_dynamic_gating
from hotset.experts.weights import ATTRIBUTE, LayerExperts, experts_layers, experts_of
from hotset.model.loaded import LoadedModel
from hotset.options import Options

NUM_EXPERTS = 4


class Layer(nn.Module):
    def __init__(self, config: SimpleNamespace, ffn: int = 16, act: Any = nn.SiLU) -> None:
        super().__init__()
        self.num_experts = NUM_EXPERTS
        self.act_fn = act()
        self.gate_up_proj = nn.Parameter(torch.randn(NUM_EXPERTS, 2 * ffn, 24))
        self.up_proj = self.gate_up_proj
        self.down_proj = nn.Parameter(torch.randn(NUM_EXPERTS, 24, ffn))
        self.requires_grad_(False)


def make_layer(*, gate: Any = None, layer: dict[str, Any] | None = None, **kind: bool) -> Any:
    members = {} if gate is None else {"_apply_gate": gate}
    decorated = use_experts_implementation(type("Layer", (Layer,), members), **kind)
    return decorated(SimpleNamespace(_experts_implementation="eager"), **(layer or {}))


def fused(experts: LayerExperts, num_rows: int = 1) -> bool:
    return is_fused(experts, experts.weights, num_rows)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_fused_kernel", lambda weight: True)


def own_gate(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return layer.act_fn(gate) * (up + 1)


def test_experts_with_the_default_gate_are_fused(any_device: None) -> None:
    assert fused(experts_of(make_layer()))


OTHER_KINDS: list[dict[str, Any]] = [
    {"gate": own_gate},
    {"has_gate": False},
    {"has_bias": True},
    {"is_transposed": True},
    {"is_concatenated": False},
    {"layer": {"act": nn.GELU}},
    {"layer": {"ffn": 12}},  # rows of 24 bytes
]
if HAS_POST_EXPERT_NORM:
    OTHER_KINDS.append({"has_post_expert_norm": True})


@pytest.mark.parametrize("kind", OTHER_KINDS, ids=" ".join)
def test_experts_of_any_other_kind_are_not(kind: dict[str, Any], any_device: None) -> None:
    assert not fused(experts_of(make_layer(**kind)))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", True),
        ("qwen3_moe", True),
        ("olmoe", True),
        ("deepseek_v3", True),
        ("granitemoe", True),
        ("gpt_oss", False),
    ],
)
def test_models_whose_experts_can_be_fused(family: str, expected: bool, any_device: None) -> None:
    model = make_model(family)
    layers = experts_layers(model)
    assert layers
    assert all(fused(layer) == expected for layer in layers)
    use_dynamic_gating(model)
    pack_experts(model)  # their stacked weights are gone
    assert not any(fused(layer) for layer in layers)


def test_weights_on_the_cpu_are_not_read_by_kernels() -> None:
    layer = make_layer().to(torch.bfloat16)
    assert not has_fused_kernel(layer.gate_up_proj)
    assert not fused(experts_of(layer))


def test_many_rows_an_expert_are_left_to_pytorch_where_it_has_a_product(any_device: None) -> None:
    most = NUM_EXPERTS * FUSED_MOST_ROWS_PER_EXPERT
    for dtype, large in ((torch.bfloat16, False), (torch.float16, True)):
        layer = make_layer().to(dtype)
        assert fused(experts_of(layer), most)
        assert fused(experts_of(layer), most + 1) == large


def test_the_table_says_where_each_expert_begins_and_follows_the_weights() -> None:
    weight = torch.zeros(5, 8, 16, dtype=torch.bfloat16)
    table = address_table(weight)
    assert table.tolist() == [part.data_ptr() for part in weight]
    assert address_table(weight) is table
    assert address_table(weight[1:]).tolist() == table[1:].tolist()
    other = torch.zeros(5, 8, 16, dtype=torch.bfloat16)
    assert address_table(other).tolist() == [part.data_ptr() for part in other]


def test_a_layer_that_is_not_fused_is_computed_as_before() -> None:
    torch.manual_seed(0)
    layer = make_layer()
    x = torch.randn(3, 24)
    ids = torch.tensor([[0, 3], [1, 2], [3, 0]])
    weights = torch.rand(3, 2)
    expected = torch.zeros(3, 24)
    for token, place in ((t, k) for t in range(3) for k in range(2)):
        expert = ids[token, place]
        row = layer._apply_gate(x[token : token + 1] @ layer.gate_up_proj[expert].T)
        expected[token] += (row @ layer.down_proj[expert].T)[0] * weights[token, place]
    got = dynamic_experts(layer, x, ids, weights)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [{}, {"expert_slots": 2}], ids=["resident", "hosted"])
def test_an_engine_hangs_one_attribute_on_modules_of_transformers(slots: dict[str, int]) -> None:
    model = make_model("qwen3_moe")
    before = {id(module): set(vars(module)) for module in model.modules()}
    loaded = LoadedModel(model, None, "tiny", "tiny", (2,), 512)
    with contextlib.closing(build_engine(Options.of(hot_gib=0.001, **slots), loaded)) as engine:
        run(engine, [[5, 9, 13]])
        kept = [module for module in model.modules() if id(module) in before]
        assert set().union(*(set(vars(each)) - before[id(each)] for each in kept)) == {ATTRIBUTE}
