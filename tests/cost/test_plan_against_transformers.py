"""Byte counts of the planner against the models that transformers builds, on the meta device."""

from typing import Any

import pytest
import torch
from family_configs import FAMILIES, HEAD, LINEAR, MLA, MOE, TINY, build
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText

from hotset.cost.attention import Kind
from hotset.cost.cache_spec import State
from hotset.cost.catalog import bundled_config, bundled_models
from hotset.cost.families import shape_from_config
from hotset.errors import PlanError


def num_params(config: dict[str, Any]) -> int:
    model = build(config, "meta")
    # Of experts that return their input (LongCat-Flash), which no checkpoint has.
    idle = [
        experts.gate_up_proj[experts.num_routed_experts :]
        for experts in model.modules()
        if getattr(experts, "zero_expert_num", 0)
    ]
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in idle)


@pytest.mark.parametrize("name", bundled_models())
def test_bundled_model_has_the_parameters_that_transformers_creates(name: str) -> None:
    config, _ = bundled_config(name)
    assert shape_from_config(config, name).total_params == num_params(config)


@pytest.mark.parametrize(
    ("model_type", "facts"), FAMILIES, ids=[f"{i}-{m}" for i, (m, _) in enumerate(FAMILIES)]
)
def test_family_has_the_parameters_that_transformers_creates(
    model_type: str, facts: dict[str, Any]
) -> None:
    config = {**TINY, **facts, "model_type": model_type}
    assert shape_from_config(config, model_type).total_params == num_params(config)


@pytest.mark.parametrize(
    ("model_type", "facts"), FAMILIES, ids=[f"{i}-{m}" for i, (m, _) in enumerate(FAMILIES)]
)
def test_a_config_is_read_alike_as_it_came_and_as_transformers_writes_it(
    model_type: str, facts: dict[str, Any]
) -> None:
    # transformers writes some fields under other names than it reads, and all defaults.
    config = {**TINY, **facts, "model_type": model_type}
    again = shape_from_config(AutoConfig.for_model(**config).to_dict(), "one")
    once = shape_from_config(config, "one")
    assert (again.layers, again.total_params) == (once.layers, once.total_params)


@pytest.mark.parametrize(
    ("model_type", "facts"), FAMILIES, ids=[f"{i}-{m}" for i, (m, _) in enumerate(FAMILIES)]
)
def test_a_field_that_is_missing_is_what_transformers_takes_or_refused(
    model_type: str, facts: dict[str, Any]
) -> None:
    config = {**TINY, **facts, "model_type": model_type}
    for field in config.keys() - {"model_type"}:
        without = {name: value for name, value in config.items() if name != field}
        try:
            written = AutoConfig.for_model(**without).to_dict()
            expected = shape_from_config(written, "written")
            got = shape_from_config(without, "without")
        except (PlanError, StrictDataclassError):
            continue  # refused by one of them
        assert (got.layers, got.total_params) == (expected.layers, expected.total_params), field


def test_a_published_text_part_that_lacks_fields_has_its_size() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    shape = shape_from_config({"model_type": "gemma3", "text_config": text}, "gemma-3-4b")
    assert shape.total_params == num_params(text) == 3_880_263_168


def test_layers_of_gemma4_have_the_heads_that_per_layer_config_says() -> None:
    config = {**TINY, **HEAD, "model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    config["sliding_window"] = 8
    config["per_layer_config"] = {"5": {"head_dim": 8, "num_key_value_heads": 4}}
    if "per_layer_config" in AutoConfig.for_model(**config).to_dict():  # not in transformers 5.17
        assert shape_from_config(config, "tiny").total_params == num_params(config)
    config["per_layer_config"]["0"] = {"num_key_value_heads": 1}
    heads = [layer.attention for layer in shape_from_config(config, "tiny").layers]
    assert [(a.cache.key_dim, a.cache.num_kv_heads) for a in heads] == [
        (16, 1),
        *[(16, 2)] * 4,
        (8, 4),
    ]


@pytest.mark.parametrize("types", [["dense"] * 2 + ["sparse"] * 4, ["sparse", "dense"] * 3])
def test_mlp_layer_types_are_heeded_where_transformers_does(types: list[str]) -> None:
    index = {"index_head_dim": 16, "index_n_heads": 2, "n_group": 4, "topk_group": 2}
    config = {**TINY, **MLA, **index, "model_type": "deepseek_v32", "mlp_layer_types": types}
    layers = shape_from_config(config, "tiny").layers
    assert ["sparse" if layer.num_experts else "dense" for layer in layers] == types
    assert shape_from_config(config, "tiny").total_params == num_params(config)
    config["model_type"] = "deepseek_v3"
    assert shape_from_config(config, "tiny").total_params == num_params(config)


@pytest.mark.parametrize("inner", [None, True, False])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize(
    "wrapper", ["gemma3", "gemma4", "mistral3", "qwen3_5", "qwen3_5_moe", "llama4"]
)
def test_the_flag_that_ties_a_wrappers_head_is_the_one_that_transformers_heeds(
    wrapper: str, outer: bool, inner: bool | None
) -> None:
    text_type = {"mistral3": "mistral", "llama4": "llama4_text"}.get(wrapper, f"{wrapper}_text")
    if wrapper in ("gemma3", "gemma4"):
        text_type = f"{wrapper}_text"
    facts = next(facts for name, facts in FAMILIES if name == text_type)
    text = {**TINY, **facts, "model_type": text_type, "num_hidden_layers": 2, "layer_types": None}
    text["attention_k_eq_v"] = False
    if inner is not None:
        text["tie_word_embeddings"] = inner
    config = {"model_type": wrapper, "text_config": text, "tie_word_embeddings": outer}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    head = model.language_model.lm_head if wrapper == "llama4" else model.lm_head
    is_tied = head.weight is model.get_input_embeddings().weight
    assert (shape_from_config(config, wrapper).head.count == 0) == is_tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer_config": {"1": {"intermediate_size": 64}}}, "not known for llama"),
        (
            {"model_type": "gemma4_text", **HEAD, "per_layer_config": {"1": {"skip": ["mlp"]}}},
            "per_layer_config of gemma4_text has skip",
        ),
        (
            {"model_type": "gemma4_text", **HEAD, "per_layer_config": {"6": {"head_dim": 8}}},
            "names layer '6' of 6 layers",
        ),
        (
            {"model_type": "qwen3_moe", **HEAD, **MOE, "num_local_experts": 9},
            "num_experts 8 and num_local_experts 9, which mean the same",
        ),
        ({"hidden_size": 50}, "4 attention heads, which do not divide hidden_size 50"),
        (
            {"model_type": "deepseek_v32", **MLA, "mlp_layer_types": ["dense"]},
            "expected dense or sparse for each of 6 layers",
        ),
        (
            {"model_type": "qwen3_5", "text_config": {"tie_word_embeddings": True}},
            "in text_config only",
        ),
    ],
)
def test_what_changes_sizes_and_is_not_read_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    index = {"index_head_dim": 16, "index_n_heads": 2}
    with pytest.raises(PlanError, match=message):
        shape_from_config({**TINY, "model_type": "llama", **index, **changes}, "tiny")


def cache_bytes(cache: Any) -> int:
    """Bytes of keys, values and states in a transformers cache."""
    seen, total = set(), 0
    for layer in cache.layers:
        for value in vars(layer).values():
            items = value if isinstance(value, list | tuple) else [value]
            if isinstance(value, dict):
                items = list(value.values())
            for item in items:
                is_state = isinstance(item, torch.Tensor) and item.is_floating_point()
                if is_state and item.numel() and item.data_ptr() not in seen:
                    seen.add(item.data_ptr())
                    total += item.numel() * item.element_size()
    return total


FULL = [
    (m, f)
    for m, f in FAMILIES
    if m in ("llama", "gemma", "qwen3_moe", "olmoe", "mixtral", "gemma4_text", "gpt_oss", "qwen3")
]


@pytest.mark.parametrize(
    ("model_type", "facts"), FULL, ids=[f"{i}-{m}" for i, (m, _) in enumerate(FULL)]
)
def test_kv_bytes_are_those_of_the_cache_that_transformers_fills(
    model_type: str, facts: dict[str, Any]
) -> None:
    config = {**TINY, **facts, "model_type": model_type}
    tokens = 6  # below every window: all layers keep all tokens
    model = build(config, "cpu").eval()
    with torch.no_grad():
        cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    shape = shape_from_config(config, model_type)
    assert shape.kv_bytes(tokens, "fp32") == cache_bytes(cache)


def test_mla_latent_is_what_the_model_projects_to() -> None:
    config = {**TINY, **MLA, "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2}
    attention = build(config, "meta").model.layers[0].self_attn
    shape = shape_from_config(config, "tiny")
    width = attention.kv_a_proj_with_mqa.out_features
    assert shape.kv_bytes_per_token("bf16") == width * 2 * config["num_hidden_layers"]


def test_delta_net_state_has_the_size_of_the_models_own() -> None:
    config = {**TINY, **HEAD, **MOE, **LINEAR, "model_type": "qwen3_next"}
    config["shared_expert_intermediate_size"] = 40
    shape = shape_from_config(config, "tiny")
    mixer = build(config, "meta").model.layers[0].linear_attn
    state = (mixer.num_v_heads, mixer.head_v_dim, mixer.head_k_dim)
    conv = (mixer.conv_dim, mixer.conv_kernel_size - 1)
    recurrent = [a.cache for a, _, _ in shape.readers if a.kind is Kind.RECURRENT]
    assert recurrent == [State(state, conv)]
