"""Indexers hand over what the model's own code scores with, and select what it selects."""

import pytest
import torch
from tiny_models import make_model

from hotset.attention.sparse import indexer as indexer_module
from hotset.attention.sparse.check import check_indexers
from hotset.attention.sparse.indexer import FORMS, bind_indexers, indexers
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
