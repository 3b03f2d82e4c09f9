"""The planner's view of a loaded model against the planner's table, and of families it lacks."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from engines import run
from tiny_models import make_config, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from hotset.cost.cache_spec import Latent
from hotset.cost.families import shape_from_config
from hotset.cost.shape import ModelShape
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.model_shape import kv_note, shape_of
from hotset.executor.probe import inspect_model
from hotset.expert_options import HostedExperts
from hotset.experts.sizes import slot_bytes_of
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.units import GIB

MakeEngine = Callable[..., Engine]
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
# Families that the planner does not know, under the names that their configs have.
UNKNOWN: dict[str, dict[str, Any]] = {
    "minimax_m2": {"num_local_experts": 8, "rotary_dim": 8},
    "glm4_moe_lite": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "phimoe": {"num_local_experts": 8},
}


def make_unknown(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **UNKNOWN[family]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def shape(model: Any) -> ModelShape:
    slots = slot_bytes_of(model, HostedExperts())
    assert slots is not None
    return shape_of(model, inspect_model(model), slots, "tiny")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_a_model_has_the_sizes_that_the_planners_table_gives_it(family: str) -> None:
    model = make_model(family)
    got, table = shape(model), shape_from_config(model.config.to_dict(), family)
    assert got.dense_params == table.dense_params
    # A payload is whole pages.
    assert 0 <= got.expert_params - table.expert_params < 4096 * got.num_experts * 3
    assert (got.num_experts, got.top_k_experts) == (table.num_experts, table.top_k_experts)
    assert got.kv_bytes_per_token("fp32") == table.stored.kv_bytes_per_token("fp32")
    assert (got.embedding.count, got.head.count) == (table.embedding.count, table.head.count)
    assert [layer.num_kernels for layer in got.layers] == [x.num_kernels for x in table.layers]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize(("tokens", "past"), [(7, 0), (40, 100)])
def test_prompts_take_the_operations_that_the_planners_table_gives_them(
    family: str, tokens: int, past: int
) -> None:
    model = make_model(family)
    got, table = shape(model), shape_from_config(model.config.to_dict(), family)
    assert got.index_pair_flops == table.index_pair_flops
    for chunk in (16, 64):
        flops = got.prefill_attention_flops(tokens, past, chunk=chunk)
        assert flops == table.prefill_attention_flops(tokens, past, chunk=chunk) > 0


def test_layers_without_experts_are_dense_and_latents_count_as_latents() -> None:
    model = make_unknown("glm4_moe_lite")
    got = shape(model)
    assert [layer.num_experts for layer in got.layers] == [0, 8, 8]
    assert got.top_k_experts == 2
    cache = got.layers[0].attention.cache
    assert isinstance(cache, Latent)
    assert got.kv_bytes_per_token("fp32") == 3 * (cache.rank + cache.rope_dim) * 4


@pytest.mark.parametrize(
    ("family", "changes", "note"),
    [
        (
            "mimo_v2_flash",
            {"v_head_dim": 8, "swa_v_head_dim": 8, "num_experts_per_tok": 2, "n_routed_experts": 4},
            "1.33 times the 960 B of its keys and values without",
        ),
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16}, "2.00 times"),
        ("llama", {}, ""),
        ("gemma2", {}, ""),
        ("deepseek_v3", {}, ""),
        ("deepseek_v32", {}, ""),  # index keys are no KV
    ],
)
def test_start_says_where_a_token_takes_more_than_its_model_needs(
    family: str, changes: dict[str, Any], note: str
) -> None:
    if family in {**tiny_models.FAMILIES, **tiny_models.SPARSE_FAMILIES}:
        model = make_model(family)
    else:
        config = AutoConfig.for_model(family, **{**COMMON, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    said = kv_note(model, inspect_model(model))
    assert note in said and bool(said) == bool(note)


def test_start_of_an_engine_has_that_note_where_latents_are_not_understood(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("deepseek_v3")
    latent = shape_from_config(make_config("deepseek_v3").to_dict(), "tiny")
    assert latent.stored.kv_bytes_per_token("fp32") == engine.sizes.block_bytes // 4 == 288
    assert "KV of all heads" not in engine.report

    monkeypatch.setattr("hotset.attention.latent._expands_as_expected", lambda module: False)
    engine = make_engine("deepseek_v3")
    assert engine.sizes.block_bytes // 4 == 2304
    note = "KV of all heads is stored: 2,304 B a token, 8.00 times the 288 B of the latent alone"
    assert note in engine.report


@pytest.mark.parametrize("budget", ["hot_gib", "total_gib"])
@pytest.mark.parametrize("family", list(UNKNOWN))
def test_a_family_that_the_planner_does_not_know_takes_one_budget(family: str, budget: str) -> None:
    model = make_unknown(family)
    slots = slot_bytes_of(model, HostedExperts())
    assert slots is not None
    num_bytes = slots(slots.num_experts) // 2 + 2**20
    if budget == "total_gib":
        num_bytes += 8 * 2**20
    loaded = LoadedModel(model, None, family, family, (2,), 256)
    config = Options.of(
        max_model_len=64,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        **{budget: num_bytes / GIB},
    )
    engine = build_engine(config, loaded)
    try:
        assert engine.sizes.experts is not None
        assert "of 8 experts a layer" in engine.report
        assert len(run(engine, [[5, 9, 13], [31] * 9], max_tokens=4)) == 2
    finally:
        engine.close()
