"""Each rank's part of a model, cut by transformers' plan, without any other rank."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES as DENSE_AND_MOE
from tiny_models import HYBRID_FAMILIES, LATENT_FAMILIES, SPARSE_FAMILIES, make_config, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from hotset.errors import ConfigError, ModelError
from hotset.executor.probe import inspect_model
from hotset.experts.narrow import quantise_into, rounded_layout
from hotset.experts.weights import Narrow, experts_layers
from hotset.layout import Layout
from hotset.model.cut_model import ModelCutter
from hotset.parallel import group
from hotset.parallel.cuts import Cut, find_cuts
from hotset.parallel.parts import Part, Units, share

FAMILIES = sorted(
    {*DENSE_AND_MOE, *LATENT_FAMILIES, *SPARSE_FAMILIES, *HYBRID_FAMILIES} - {"longcat_flash"}
)


def cut_for(
    monkeypatch: pytest.MonkeyPatch, model: Any, rank: int, layout: Layout | int
) -> tuple[Any, dict[str, Part]]:
    """A copy of `model` with one rank's part, and which parts those are; a number is `tp`."""
    layout = Layout(layout) if isinstance(layout, int) else layout
    monkeypatch.setattr(group, "_current", group.Group(rank, layout, torch.device("cpu"), True))
    cut = copy.deepcopy(model)
    cutter = ModelCutter(model, "tiny")
    parts = cutter.cut_all(cut)
    cutter.cut_head(cut)
    return cut, parts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_put_together_are_the_whole(
    family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_model(family, vocab_size=257)
    found = {name: torch.full_like(weight, torch.nan) for name, weight in whole.named_parameters()}
    for rank in range(size):
        cut, parts = cut_for(monkeypatch, whole, rank, size)
        for name, weight in cut.named_parameters():
            if ".experts." in name:
                continue
            part = parts.get(name)
            if name == "lm_head.weight" and weight.shape != found[name].shape:
                piece = -(-257 // size)  # in equal pieces, the last one shorter
                part = Part(0, (slice(rank * piece, rank * piece + len(weight)),))
            _place(found[name], part, weight)
        for before, after in zip(experts_layers(whole), experts_layers(cut), strict=True):
            _join_experts(found, whole, before, after, rank, size)
    for name, weight in whole.named_parameters():
        assert torch.equal(found[name], weight), name


def _place(whole: torch.Tensor, part: Part | None, weight: torch.Tensor) -> None:
    """Put a rank's part into its place; a KV head may be on two ranks."""
    if part is None:
        part = Part(0, (slice(0, len(whole)),))
    pieces = weight.split([each.stop - each.start for each in part.slices], part.dim)
    for each, piece in zip(part.slices, pieces, strict=True):
        place = whole[(slice(None),) * part.dim + (each,)]
        assert place.isnan().all() or torch.equal(place, piece)
        place.copy_(piece)


def _join_experts(found: dict[str, Any], whole: Any, before: Any, after: Any, *at: int) -> None:
    """Put a rank's slices of experts into their places."""
    rank, size = at
    path = next(path for path, m in whole.named_modules() if m is before.module)
    middle = before.weights[1].shape[1 if before.is_transposed else 2]
    mine = slice(rank * middle // size, (rank + 1) * middle // size)
    gate = (mine,)
    if before.has_gate and before.module.is_concatenated:
        gate = (mine, slice(middle + mine.start, middle + mine.stop))
    elif before.has_gate:
        gate = (slice(2 * mine.start, 2 * mine.stop),)
    up_dim, down_dim = (2, 1) if before.is_transposed else (1, 2)
    up, down = after.weights
    _place(found[f"{path}.{before.up_name}"], Part(up_dim, gate), up)
    _place(found[f"{path}.down_proj"], Part(down_dim, (mine,)), down)
    if before.biases is not None:
        up_bias, down_bias = after.biases
        _place(found[f"{path}.{before.up_name}_bias"], Part(1, gate), up_bias)
        if rank == 0:
            _place(found[f"{path}.down_proj_bias"], None, down_bias)
        assert rank == 0 or not down_bias.any()


@pytest.mark.parametrize(
    "family",
    ["bamba", "lfm2", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "nemotron_h", "falcon_h1"],
)
def test_each_rank_has_a_part_of_each_state(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_model(family, **({"mamba_n_groups": 1} if family == "bamba" else {}))
    states = inspect_model(copy.deepcopy(whole)).states
    place = group.Group(1, Layout(2), torch.device("cpu"), True)
    monkeypatch.setattr(group, "_current", place)
    cutter = ModelCutter(whole, "tiny")
    cutter.cut_all(whole)
    cutter.join_outputs(whole)
    parts = inspect_model(whole).states
    assert parts.keys() == states.keys()
    for layer, state in states.items():
        part = parts[layer]
        assert 2 * part.num_values == state.num_values
        shared = 2 * 16 * 3 * 4 if family == "bamba" else 0  # B and C of one group
        assert 2 * part.conv_bytes == state.conv_bytes + shared


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon_h1", {"mamba_n_groups": 1, "mamba_rms_norm": True}),  # over all heads
        ("qwen3_next", {"linear_num_key_heads": 1}),
        ("kimi_linear", {}),
    ],
)
def test_a_mixer_that_cannot_be_cut_is_whole_on_each_rank(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_model(family, **changes)
    cut, parts = cut_for(monkeypatch, whole, 1, 2)
    theirs = dict(whole.named_parameters())
    mixers = [path for path, module in whole.named_modules() if hasattr(module, "conv1d")]
    assert mixers
    for name, weight in cut.named_parameters():
        if name.startswith(tuple(f"{path}." for path in mixers)):
            assert name not in parts and torch.equal(weight, theirs[name])


def test_units_are_shared_out_one_layout_after_another() -> None:
    layout = (Units(4, 3), Units(1, 2), Units(2))
    assert share(layout, 0, 2) == (slice(0, 6), slice(12, 14), slice(14, 15))
    assert share(layout, 1, 2) == (slice(6, 12), slice(12, 14), slice(15, 16))


def test_a_tied_head_is_cut_and_its_embedding_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_model("llama", tie_word_embeddings=True, vocab_size=255)
    cut, _ = cut_for(monkeypatch, whole, 1, 2)
    assert cut.get_input_embeddings().weight.shape == (255, 64)
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight[128:])
    embedding = cut.get_input_embeddings().weight
    assert cut.lm_head.weight.data_ptr() == embedding[128:].data_ptr()  # not a copy


def test_attention_whose_norms_see_all_heads_stays_whole() -> None:
    cuts = find_cuts(make_model("olmoe"), 2, "tiny").cuts
    assert set(cuts.values()) == {Cut.HEAD, Cut.EXPERTS}


def test_a_model_without_a_plan_is_refused() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", **sizes, num_key_value_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="tiny has no tensor-parallel plan in transformers"):
        find_cuts(model, 2, "tiny")


def test_experts_that_add_what_came_in_are_refused() -> None:
    with pytest.raises(ModelError, match="has 'moe_identity_expert' for model"):
        find_cuts(make_model("longcat_flash"), 2, "tiny")


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


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_lanes_share_experts_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_model(family)
    for rank in range(2):
        slices, parts = cut_for(monkeypatch, whole, rank, Layout(dp=2, es=2))
        by_tp, _ = cut_for(monkeypatch, whole, rank, 2)
        for one, other in zip(experts_layers(slices), experts_layers(by_tp), strict=True):
            assert one.weights is not None and other.weights is not None
            assert all(map(torch.equal, one.weights, other.weights))
        assert not parts
        names = [name for name, _ in whole.named_parameters() if ".experts." not in name]
        for name in names:
            assert torch.equal(slices.get_parameter(name), whole.get_parameter(name))


@pytest.mark.parametrize("layout", [Layout(tp=2, ep=2), Layout(dp=2, ep=2)], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_each_rank_has_its_own_whole_experts(
    family: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_model(family)
    models = [whole, *(cut_for(monkeypatch, whole, rank, layout)[0] for rank in range(2))]
    for before, *parts in zip(*map(experts_layers, models), strict=True):
        assert [part.num_experts for part in parts] == [2, 2]
        for name, weight in before.module.named_parameters(recurse=False):
            pieces = [part.module.get_parameter(name) for part in parts]
            assert torch.equal(torch.cat(pieces), weight)


def test_experts_that_ranks_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = make_model("qwen3_moe", moe_intermediate_size=33)
    with pytest.raises(ConfigError, match=r"dp=2,es=2 does not divide the 33 columns .* give ep"):
        cut_for(monkeypatch, odd, 0, Layout(dp=2, es=2))
    few = make_model("qwen3_moe", num_experts=2, num_experts_per_tok=1)
    with pytest.raises(ConfigError, match="ep leaves one of 4 GPUs without any of the 2 experts"):
        cut_for(monkeypatch, few, 0, Layout(dp=4, ep=4))
    with pytest.raises(ConfigError, match="dp=2 has ranks share experts, and tiny has none"):
        cut_for(monkeypatch, make_model("llama"), 0, Layout(dp=2, es=2))


def test_whole_experts_in_few_bits_are_left_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    payloads, kept = [], []
    for rank in range(2):
        layout = Layout(tp=2, ep=2)
        one = group.Group(rank, layout, torch.device("cpu"), True)
        monkeypatch.setattr(group, "_current", one)
        model = make_model("qwen3_moe", moe_intermediate_size=64).requires_grad_(False)
        cutter = ModelCutter(model, "tiny")
        for each in experts_layers(model):
            narrow = rounded_layout(each.layout.up, each.layout.down, "fp8")
            assert each.weights is not None
            whole = torch.zeros(each.num_experts, narrow.payload_bytes, dtype=torch.uint8)
            quantise_into(narrow, whole, *each.weights, torch.device("cpu"))
            each.hold(Narrow(each.layout, narrow, whole))
        payloads.append([each.state.payloads for each in experts_layers(model)])
        cutter.cut_all(model)
        cutter.join_outputs(model)
        kept.append([each.state.payloads for each in experts_layers(model)])
    for whole, *parts in zip(payloads[0], *kept, strict=True):
        assert [len(part) for part in parts] == [4, 4]
        assert torch.equal(torch.cat(parts), whole)
