"""Layers that cache latents: what they hand over, and that it stands for the keys and values."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import difference, gather, paged_logits
from tiny_models import FAMILIES, LATENT_FAMILIES, make_model
from torch import nn

from hotset.attention.latent import hand_over_latents, latent_weights
from hotset.cost.cache_spec import KeysValues, Latent
from hotset.executor.probe import inspect_model
from hotset.linear.fp8_linear import Fp8Linear, can_be_fp8
from hotset.linear.reads import is_replaceable
from hotset.model.loader import load_model

WITHOUT_LATENTS = [family for family in FAMILIES if family not in LATENT_FAMILIES]


def attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(type(module), "expand_kv")]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_keys_and_values_made_of_a_latent_are_those_of_the_model_bit_for_bit(family: str) -> None:
    model = make_model(family)
    layout = inspect_model(model)
    assert len(attentions(model)) == len(layout.layers)
    for module, asked in zip(attentions(model), layout.layers, strict=True):
        spec = asked.cache
        assert isinstance(spec, Latent) and asked.latent is not None
        assert (spec.rank, spec.rope_dim, spec.num_kv_heads) == (16, 8, 1)
        latent, rotary = numbers(1, 1, 5, 16), numbers(1, 1, 5, 8, seed=1)
        assert module.expand_kv(latent, rotary) == (rotary, latent)  # as they are
        theirs = type(module).expand_kv(module, latent, rotary)
        ours = asked.latent.expand(torch.cat((latent[0], rotary[0]), dim=-1))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
        assert spec.expanded == KeysValues(4, ours[0].shape[-1], ours[1].shape[-1])
        # No copy: what is loaded into the model later is read here.
        assert asked.latent.heads.data_ptr() == module.kv_b_proj.weight.data_ptr()
        assert not is_replaceable(module.kv_b_proj)
        assert module.kv_b_proj not in can_be_fp8(model).values()


def test_absorbed_queries_and_mixed_latents_give_what_keys_and_values_give() -> None:
    layer = inspect_model(make_model("deepseek_v2")).layers[0]
    assert layer.latent is not None
    rows, query = numbers(1, 9, 24), numbers(4, 1, 24, seed=1)
    keys, values = layer.latent.expand(rows)  # [1, H, S, D + P], [1, H, S, D_v]
    absorbed = layer.latent.absorb(query)
    scores = (query @ keys[0].transpose(1, 2)).softmax(-1)
    torch.testing.assert_close((absorbed @ rows[0].T).softmax(-1), scores)
    torch.testing.assert_close(
        layer.latent.mix(scores @ rows[0][:, :16]), scores @ values[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_logits_over_latents_are_those_over_keys_and_values(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    layout = inspect_model(model)
    found = paged_logits(model, layout, gather(layout))

    monkeypatch.setattr("hotset.attention.latent._expands_as_expected", lambda module: False)
    plain = make_model(family)
    layout = inspect_model(plain)
    assert all(isinstance(layer.cache, KeysValues) for layer in layout.layers)
    expected = paged_logits(plain, layout, gather(layout))
    assert max(map(difference, expected, found)) < 2e-6


@pytest.mark.parametrize("family", WITHOUT_LATENTS)
def test_other_models_are_left_as_they_are(family: str) -> None:
    model = make_model(family)
    layout = inspect_model(model)
    assert not attentions(model) and not any(map(latent_weights, model.modules()))
    assert all(type(spec) is KeysValues for spec in layout.cache_specs)
    assert layout.default_block_size == 16


def test_8_bit_weights_leave_the_layer_that_makes_keys_as_it_is(tmp_path: Path) -> None:
    make_model("youtu").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu", dtype="fp8").model
    for module in attentions(model):
        assert type(module.kv_b_proj) is nn.Linear
        assert type(module.o_proj) is Fp8Linear
    layout = inspect_model(model)
    assert layout.layers[0].latent is not None
    assert layout.layers[0].latent.heads.dtype == torch.bfloat16
    assert all(logits.isfinite().all() for logits in paged_logits(model, layout, gather(layout)))


def with_bias(module: Any) -> None:
    module.kv_b_proj = nn.Linear(16, 128, bias=True)


def of_another_size(module: Any) -> None:
    module.qk_nope_head_dim = 17  # 33 numbers per head do not divide 128


def without_a_size(module: Any) -> None:
    module.kv_lora_rank = None


@pytest.mark.parametrize("change", [with_bias, of_another_size, without_a_size])
def test_a_layer_of_other_sizes_goes_on_handing_over_keys_and_values(change: Any) -> None:
    model = make_model("deepseek_v3")
    change(attentions(model)[1])
    hand_over_latents(model)
    assert [latent_weights(module) is None for module in attentions(model)] == [False, True, False]


def test_a_class_that_makes_other_keys_goes_on_handing_them_over() -> None:
    model = make_model("deepseek_v3")
    kind = type(attentions(model)[0])

    def expand_kv(self: Any, latent: torch.Tensor, rotary: torch.Tensor) -> Any:
        keys, values = kind.expand_kv(self, latent, rotary)
        return keys, 2 * values

    changed = type("Changed", (kind,), {"expand_kv": expand_kv})
    for module in attentions(model):
        module.__class__ = changed
    hand_over_latents(model)
    assert not any(map(latent_weights, attentions(model)))
    assert not any("expand_kv" in vars(module) for module in attentions(model))


def test_all_layers_hand_over_by_one_function() -> None:
    model = make_model("youtu")
    hand_over_latents(model)
    hand_over_latents(model)  # once more changes nothing
    methods = [vars(module)["expand_kv"] for module in attentions(model)]
    assert all(isinstance(method, types.MethodType) for method in methods)
    assert len({method.__func__ for method in methods}) == 1
