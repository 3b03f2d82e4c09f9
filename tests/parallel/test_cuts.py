"""Each rank's part of a model, cut by transformers' plan, without any other rank."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import make_config, make_model
from transformers import AutoModelForCausalLM

from hotset.errors import ConfigError, ModelError
from hotset.experts.weights import experts_layers
from hotset.model.cut_model import ModelCutter
from hotset.parallel import group
from hotset.parallel.cuts import Cut, find_cuts

FAMILIES = ["llama", "llama-mha", "llama-mqa", "mistral", "qwen3", "gemma2", "gemma3_text"]
EXPERTS = ["mixtral", "qwen3_moe", "olmoe"]


def cut_for(
    monkeypatch: pytest.MonkeyPatch, model: Any, rank: int, size: int
) -> tuple[Any, dict[str, tuple[slice, ...]]]:
    """A copy of `model` with one rank's part, and which parts those are."""
    monkeypatch.setattr(group, "_current", group.Group(rank, size, torch.device("cpu"), True))
    cut = copy.deepcopy(model)
    cutter = ModelCutter(model, "tiny")
    parts = cutter.cut_all(cut)
    cutter.cut_head(cut)
    return cut, parts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_parts_put_together_are_the_whole(
    family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_model(family, vocab_size=257)
    found = {name: torch.full_like(weight, torch.nan) for name, weight in whole.named_parameters()}
    for rank in range(size):
        cut, parts = cut_for(monkeypatch, whole, rank, size)
        for name, weight in cut.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                continue
            part = parts.get(name, (slice(None),))
            if name == "lm_head.weight":  # in equal pieces, the last one shorter
                piece = -(-257 // size)
                part = (slice(rank * piece, (rank + 1) * piece),)
            place = found[name][part]
            assert place.isnan().all() or torch.equal(place, weight)  # a KV head on two ranks
            place.copy_(weight)
        for before, after in zip(experts_layers(whole), experts_layers(cut), strict=True):
            _join_experts(found, whole, before, after, rank, size)
    for name, weight in whole.named_parameters():
        assert torch.equal(found[name], weight), name


def _join_experts(found: dict[str, Any], whole: Any, before: Any, after: Any, *at: int) -> None:
    rank, size = at
    path = next(path for path, m in whole.named_modules() if m is before.module)
    up, down = after.weights
    middle = before.weights[1].shape[2]
    mine = slice(rank * middle // size, (rank + 1) * middle // size)
    found[f"{path}.down_proj"][:, :, mine] = down
    gate, up = up.chunk(2, 1)
    found[f"{path}.gate_up_proj"][:, :middle][:, mine] = gate
    found[f"{path}.gate_up_proj"][:, middle:][:, mine] = up


def test_a_tied_head_is_cut_and_its_embedding_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_model("llama", tie_word_embeddings=True, vocab_size=255)
    cut, _ = cut_for(monkeypatch, whole, 1, 2)
    assert cut.get_input_embeddings().weight.shape == (255, 64)
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight[128:])


def test_attention_whose_norms_see_all_heads_stays_whole() -> None:
    cuts = find_cuts(make_model("olmoe"), 2, "tiny").cuts
    assert set(cuts.values()) == {Cut.HEAD, Cut.EXPERTS}


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ModelError, match="tiny has no tensor-parallel plan in transformers"):
        find_cuts(make_model("gpt_oss"), 2, "tiny")


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tp=3 does not divide the 4 .* tiny; possible: 1, 2, 4"):
        find_cuts(make_model("llama"), 3, "tiny")


def test_experts_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_moe", moe_intermediate_size=33)
    with pytest.raises(ConfigError, match="tp=2 does not divide the 33 columns of the experts"):
        cut_for(monkeypatch, model, 0, 2)


def test_a_plan_that_leaves_out_a_layer_with_all_columns_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config("llama"))
        for layer in model.model.layers:
            layer.self_attn.gate = torch.nn.Linear(64, 4)  # one number for each head
    with pytest.raises(ModelError, match="leaves out a layer or a parameter beside it"):
        find_cuts(model, 2, "tiny")


def test_a_way_to_cut_that_is_not_known_is_refused() -> None:
    model = make_model("llama")
    model.tp_plan = {**model.tp_plan, "model.layers.*.mlp.down_proj": "sequence_parallel"}
    with pytest.raises(ModelError, match="has 'sequence_parallel' for model"):
        find_cuts(model, 2, "tiny")
