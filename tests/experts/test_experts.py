"""Dynamic gating computes what transformers' own experts compute, for every kind of experts."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import reference, run
from expert_layers import HIDDEN, KINDS, NUM_EXPERTS, PLAIN, make_layers
from tiny_models import make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hotset.engine.engine import Engine
from hotset.executor.probe import weights_bytes
from hotset.experts import gating as experts
from hotset.experts.gating import (
    dynamic_experts,
    pack_experts,
    unpack_experts,
    use_dynamic_gating,
)

MakeEngine = Callable[..., Engine]
MOE_FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe"]


def one_by_one(layer: nn.Module, x: Any, ids: Any, weights: Any) -> torch.Tensor:
    """The plainest way to compute experts: token by token, in float64."""
    layer = copy.deepcopy(layer).double()
    up = "gate_up_proj" if layer.has_gate else "up_proj"
    out = torch.zeros(x.shape, dtype=torch.float64)

    def linear(name: str, expert: int, row: torch.Tensor) -> torch.Tensor:
        weight = getattr(layer, name)[expert]
        result = row @ (weight if layer.is_transposed else weight.T)
        return result + getattr(layer, f"{name}_bias")[expert] if layer.has_bias else result

    for token in range(len(x)):
        for place, expert in enumerate(ids[token].tolist()):
            if expert >= NUM_EXPERTS:
                continue
            row = linear(up, expert, x[token].double().unsqueeze(0))
            row = layer._apply_gate(row) if layer.has_gate else layer.act_fn(row)
            row = linear("down_proj", expert, row)
            row = (
                layer.post_expert_norm(row)
                if getattr(layer, "has_post_expert_norm", False)
                else row
            )
            out[token] += row[0] * weights[token, place].double()
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_every_kind_of_experts_gives_what_token_by_token_gives(
    kind: dict[str, bool], num_tokens: int, packed: bool
) -> None:
    [layer] = make_layers(1, **kind)
    x = torch.randn(num_tokens, HIDDEN)
    weights, ids = torch.randn(num_tokens, NUM_EXPERTS).softmax(-1).topk(2)
    expected = one_by_one(layer, x, ids, weights)
    if packed:
        pack_experts(layer)
        assert layer.down_proj is None
    result = dynamic_experts(layer, x, ids, weights)
    torch.testing.assert_close(result, expected.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_experts_of_other_ranks_add_nothing_whatever_their_weight(
    kind: dict[str, bool], packed: bool
) -> None:
    [layer] = make_layers(1, **kind)
    layer._is_expert_parallel = True
    x = torch.randn(9, HIDDEN)
    ids = torch.randint(0, 2 * NUM_EXPERTS, (9, 3))
    ids[0] = NUM_EXPERTS  # of no expert of this rank
    kept = ids.clone()
    weights = torch.rand(9, 3)
    expected = one_by_one(layer, x, ids, weights)
    if packed:
        pack_experts(layer)
    torch.testing.assert_close(
        dynamic_experts(layer, x, ids, weights), expected.float(), atol=2e-5, rtol=1e-4
    )
    assert dynamic_experts(layer, x, ids.clamp(min=NUM_EXPERTS), weights).count_nonzero() == 0
    assert torch.equal(ids, kept)


@torch.inference_mode()
def test_a_token_gets_the_same_values_beside_tokens_that_are_routed_elsewhere() -> None:
    [layer] = make_layers(1, **PLAIN)
    x = torch.randn(8, HIDDEN)
    ids = torch.tensor([[0, 1]] + [[2, 3]] * 7)
    weights = torch.rand(8, 2)
    alone = dynamic_experts(layer, x[:1], ids[:1], weights[:1])
    assert torch.equal(dynamic_experts(layer, x, ids, weights)[:1], alone)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_an_engine_computes_each_family_by_dynamic_gating_and_answers_as_transformers_does(
    family: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return dynamic_experts(*args, **kwargs)

    monkeypatch.setattr(experts, "dynamic_experts", counted)
    prompts = [[5, 9, 13, 200, 7], [31] * 20, [77, 3, 250]]
    engine = make_engine(family, max_num_batched_tokens=16)
    assert run(engine, prompts) == reference(family, prompts)
    assert len(calls) > 2 * 12  # a call for each layer of each step


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_packing_keeps_the_bytes_of_the_weights_and_the_logits(family: str) -> None:
    model = make_model(family)
    before = weights_bytes(model)
    tokens = torch.tensor([[5, 9, 13, 200, 7]])
    with torch.inference_mode():
        expected = model(tokens).logits
        layers = use_dynamic_gating(model)
        pack_experts(model)
        pack_experts(model)  # another engine over the same model
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert layers == (2 if family == "deepseek_v3" else 3)  # its first layer is dense
    assert weights_bytes(model) == before
    assert use_dynamic_gating(model) == layers


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_unpacking_gives_the_same_bits_back(family: str) -> None:
    model = make_model(family)
    use_dynamic_gating(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    pack_experts(model)
    assert len(dict(model.named_parameters())) < len(before)
    for _ in range(2):
        unpack_experts(model)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_with_its_own_loop_over_experts_is_left_alone_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = AutoConfig.for_model(
        "jetmoe",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    before = config._experts_implementation
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # loading, sizing and the engine each ask
            assert use_dynamic_gating(model) == 0
    [record] = caplog.records
    assert "JetMoeForCausalLM computes its experts in its own way" in record.getMessage()
    assert model.config._experts_implementation == before


def test_a_model_without_experts_is_left_alone_and_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert use_dynamic_gating(make_model("llama")) == 0
    assert not caplog.records
