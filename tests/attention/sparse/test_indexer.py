"""Indexers hand over what the model's own code scores with, and select what it selects."""

import pytest
import torch
from tiny_models import make_model

from hotset.attention.sparse import indexer as indexer_module
from hotset.attention.sparse.check import check_indexers
from hotset.attention.sparse.indexer import (
    FORMS,
    Index,
    NextLayer,
    bind_guesses,
    bind_indexers,
    indexers,
)
from hotset.errors import ModelError

FAMILIES = tuple(FORMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_indexer_selects_what_the_models_own_code_does(family: str) -> None:
    model = make_model(family)
    bind_indexers(model)

    check_indexers(model)

    bound = list(indexers(model))
    assert bound
    assert len({indexer.forward.__func__ for indexer in bound}) == 1  # one piece of compiled code


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
def test_the_form_of_another_family_is_refused(
    family: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == other:
        return
    model = make_model(family)
    monkeypatch.setitem(indexer_module.FORMS, family, FORMS[other])
    bind_indexers(model)

    with pytest.raises(ModelError, match=rf"\({family}\).* layer 0 selects other tokens"):
        check_indexers(model)


def test_an_unknown_indexer_is_refused_by_name_and_left_as_it_is() -> None:
    model = make_model("deepseek_v32")
    model.config.model_type = "deepseek_v99"

    with pytest.raises(ModelError, match=r"DeepseekV32Indexer.*: supported are those of deepseek"):
        bind_indexers(model)

    assert all("forward" not in indexer.__dict__ for indexer in indexers(model))


def test_an_indexer_whose_code_changed_its_call_is_refused() -> None:
    model = make_model("deepseek_v32")
    bind_indexers(model)
    del model.model.layers[0].self_attn.indexer.softmax_scale

    with pytest.raises(ModelError, match=r"layer 0 cannot be checked: .*softmax_scale"):
        check_indexers(model)


def test_the_check_leaves_the_number_of_selected_tokens_alone() -> None:
    model = make_model("glm_moe_dsa", index_topk=24)
    bind_indexers(model)

    check_indexers(model)

    assert {indexer.index_topk for indexer in indexers(model)} == {24}


def test_a_model_without_indexers_is_left_alone() -> None:
    model = make_model("llama")
    bind_indexers(model)
    check_indexers(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_index_has_the_documented_shapes(dtype: torch.dtype) -> None:
    model = make_model("hy_v4").to(dtype)
    bind_indexers(model)
    indexer = next(iter(indexers(model)))
    hidden = torch.randn(1, 5, model.config.hidden_size, dtype=dtype)
    residual = torch.randn(1, 5, model.config.q_lora_rank, dtype=dtype)
    rotary = model.model.rotary_emb(hidden, position_ids=torch.arange(5)[None])

    index = indexer(hidden, residual, rotary)

    heads, width = model.config.index_n_heads, model.config.index_head_dim
    assert index.query.shape == (1, 5, heads, width)
    assert index.key.shape == (1, 5, width)
    assert index.query.dtype == index.key.dtype == dtype
    assert index.weights.shape == (1, 5, heads)
    assert index.weights.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_indexer_is_asked_about_the_residual_stream_as_its_own_layer_norms_it(
    family: str,
) -> None:
    """So a guess is what it would have selected with this layer's input."""
    model = make_model(family, mlp_layer_types=["dense"] * 3)
    bind_indexers(model)
    layers = [one for one in model.model.layers if one.self_attn.indexer is not None]
    here, there = layers[:2]
    for norm in (here.input_layernorm, there.input_layernorm):
        norm.weight.data = torch.rand_like(norm.weight) + 0.5
    stream = torch.randn(1, 7, model.config.hidden_size)
    positions = model.model.rotary_emb(stream, position_ids=torch.arange(7)[None])

    def asked(layer: torch.nn.Module) -> Index:
        hidden, attention = layer.input_layernorm(stream), layer.self_attn
        residual = attention.q_a_layernorm(attention.q_a_proj(hidden))
        index: Index = attention.indexer(hidden, residual, positions)
        return index

    assert asked(here).guess is None
    bind_guesses(model, 5)
    guess, expected = asked(here).guess, asked(there)
    assert guess is not None
    torch.testing.assert_close(guess.query, expected.query[:, :5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guess.weights, expected.weights[:, :5], rtol=1e-4, atol=1e-5)
    assert [asked(layer).guess is None for layer in layers] == [*[False] * (len(layers) - 1), True]
    bind_guesses(model, None)
    assert asked(here).guess is None


@pytest.mark.parametrize(
    ("kinds", "types", "guessing"),
    [
        ("ddd", "FFF", [True, True, False]),
        ("dss", "FFF", [False, True, False]),
        ("ssd", "FFF", [True, True, False]),
        ("dsd", "FSF", [True, False]),
        ("dds", "FSF", [False, False]),
    ],
)
def test_a_guess_is_made_where_experts_compute_before_the_next_layer_that_selects(
    kinds: str, types: str, guessing: list[bool]
) -> None:
    """Or where no layer has any."""
    model = make_model(
        "glm_moe_dsa",
        mlp_layer_types=[{"d": "dense", "s": "sparse"}[kind] for kind in kinds],
        indexer_types=[{"F": "full", "S": "shared"}[kind] for kind in types],
    )
    bind_indexers(model)
    bind_guesses(model, 5)
    assert [indexer.next_layer is not None for indexer in indexers(model)] == guessing


def test_what_keeps_selections_from_being_guessed_is_said_and_none_is() -> None:
    model = make_model("deepseek_v32")
    bind_indexers(model)
    del model.model.layers[2].self_attn.q_a_layernorm

    with pytest.raises(ModelError, match=r"DeepseekV32.*q_a_layernorm.*; give row_prefetch 1 or"):
        bind_guesses(model, 5)

    assert all(indexer.next_layer is None for indexer in indexers(model))


def test_a_weight_of_a_norm_that_is_zero_tells_nothing_of_the_stream() -> None:
    model = make_model("deepseek_v32")
    bind_indexers(model)
    here, there = model.model.layers[:2]
    here.input_layernorm.weight.data[3] = 0.0
    hidden, _ = NextLayer(here, there, 4).inputs(torch.ones(1, 2, model.config.hidden_size))
    assert hidden.isfinite().all() and (hidden[..., 3] == 0).all() and (hidden[..., 4] == 1).all()
