"""Bytes of weights and KV, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hotset.cost.attention import Kind
from hotset.cost.catalog import bundled_config, bundled_models, load_model
from hotset.cost.families import shape_from_config
from hotset.errors import PlanError


def test_llama_3_70b_keeps_40_gib_for_one_user_of_131072_tokens() -> None:
    shape = load_model("llama-3-70b")
    assert shape.kv_bytes_per_token("bf16") == 327_680
    assert shape.kv_bytes(131_072, "bf16") == 40 * 2**30
    assert shape.weights_bytes == 70_553_706_496 * 2


@pytest.mark.parametrize(
    ("name", "params", "kv_bytes"),
    [
        ("llama-3-8b", 8_030_261_248, 131_072),
        ("deepseek-v3", 671_026_404_352, 70_272),
        ("gpt-oss-20b", 20_914_757_184, 24_576),
        ("qwen3-30b-a3b", 30_532_122_624, 98_304),
        ("gemma-3-27b", 27_009_346_304, 81_920),
        ("qwen3-next-80b-a3b", 79_674_391_296, 24_576),
    ],
)
def test_bundled_model_has_the_published_size(name: str, params: int, kv_bytes: int) -> None:
    shape = load_model(name)
    assert (shape.total_params, shape.kv_bytes_per_token("bf16")) == (params, kv_bytes)


def test_every_bundled_model_names_its_source() -> None:
    for name in bundled_models():
        assert bundled_config(name)[1].startswith("https://")


def test_active_parameters_are_dense_ones_and_the_chosen_experts() -> None:
    shape = load_model("deepseek-v3")
    expert = 3 * 7168 * 2048
    assert shape.active_params == shape.total_params - 58 * (256 - 8) * expert
    # Block scales: one float32 for 128 x 128.
    assert shape.expert_bytes_each == expert + 4 * expert // 128**2


def test_mxfp4_experts_take_four_and_a_quarter_bits() -> None:
    shape = load_model("gpt-oss-20b")
    weights, biases = 3 * 2880 * 2880, 3 * 2880
    assert shape.expert_bytes_each == weights * 17 // 32 + 2 * biases
    assert shape.with_weights("bf16").expert_bytes_each == 2 * (weights + biases)


def test_mla_is_one_latent_that_each_tensor_parallel_rank_holds() -> None:
    shape = load_model("deepseek-v3")
    assert shape.kv_bytes(1000, "bf16", tp=8) == shape.kv_bytes(1000, "bf16") == 61 * 576 * 2000
    assert shape.kv_bytes_per_token("fp8_ds_mla") == 61 * 656


def test_prompts_over_latents_make_keys_of_what_is_before_each_step_or_are_absorbed() -> None:
    v3 = load_model("deepseek-v3")
    per_layer_and_head = 61 * 128 * 2
    pairs = 1024 * (32_768 + 512)
    expanded = (192 + 128) * pairs + 512 * (128 + 128) * 32_768
    flops = v3.prefill_attention_flops(1024, 32_768)
    assert flops == per_layer_and_head * expanded
    # In two steps the tokens of the first are made into keys and values once more.
    more = v3.prefill_attention_flops(1024, 32_768, chunk=512) - flops
    assert more == per_layer_and_head * 512 * (128 + 128) * (32_768 + 512)
    few = v3.prefill_attention_flops(64, 32_768)
    assert few == per_layer_and_head * (2 * 512 + 64) * 64 * (32_768 + 32)
    sparse = load_model("glm-5")
    assert sparse.prefill_attention_flops(1024, 32_768) == (
        78 * 64 * 2 * (2 * 512 + 64) * 1024 * 2048
    )


def test_grouped_query_kv_is_cut_until_each_rank_has_one_head() -> None:
    shape = load_model("llama-3-8b")
    whole = shape.kv_bytes(4096, "bf16")
    assert [shape.kv_bytes(4096, "bf16", tp=t) * t // whole for t in (1, 4, 8, 16)] == [1, 1, 1, 2]


def test_window_layers_stop_growing_unless_the_engine_holds_them() -> None:
    shape = load_model("gpt-oss-20b")
    layer = 2 * 8 * 64 * 2
    assert shape.kv_bytes(131_072, "bf16") == 12 * layer * (131_072 + 128)
    assert shape.kv_bytes(131_072, "bf16", hold_windows=False) == 24 * layer * 131_072
    assert shape.kv_bytes(100, "bf16") == 24 * layer * 100


def test_linear_attention_keeps_a_state_of_fixed_size() -> None:
    shape = load_model("qwen3-next-80b-a3b")
    state = 36 * (32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * 2)
    assert shape.kv_bytes(0, "bf16") == state
    assert shape.kv_bytes(1000, "bf16") == state + 1000 * 12 * 2 * 2 * 256 * 2


_NEMOTRON_3_NANO = {
    "model_type": "nemotron_h",
    "layers_block_type": ["mamba", "moe"] * 23 + ["attention"] * 6,
    "mamba_num_heads": 64,
    "n_routed_experts": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
}
_FALCON_H1_34B = {
    "model_type": "falcon_h1",
    "num_hidden_layers": 72,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "mamba_d_ssm": 4096,
    "mamba_n_heads": 32,
    "mamba_n_groups": 2,
}
_LFM2_8B = {
    "model_type": "lfm2_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "layer_types": ["conv", "conv", "full_attention", "conv"] * 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_KIMI_LINEAR_48B = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "moe_intermediate_size": 1024,
    "linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27]},
}


@pytest.mark.parametrize(
    ("facts", "state_bytes", "kv_bytes"),
    [
        (bundled_config("qwen3.5-35b-a3b")[0], 30 * (2_097_152 + 49_152), 20_480),
        (_NEMOTRON_3_NANO, 23 * (2_097_152 + 36_864), 6_144),
        (_FALCON_H1_34B, 72 * (4_194_304 + 30_720), 147_456),
        (_LFM2_8B, 18 * 8_192, 12_288),
        (_KIMI_LINEAR_48B, 20 * (2_097_152 + 73_728), 8_064),
    ],
    ids=["qwen3.5", "nemotron-3-nano", "falcon-h1-34b", "lfm2-8b-a1b", "kimi-linear-48b"],
)
def test_a_step_reads_and_writes_the_state_of_published_hybrids(
    facts: dict[str, object], state_bytes: int, kv_bytes: int
) -> None:
    shape = shape_from_config({**tiny(), **facts}, "m")
    assert (shape.state_bytes, shape.kv_bytes_per_token("bf16")) == (state_bytes, kv_bytes)
    assert shape.kv_read_bytes(1000, "bf16") == 2 * state_bytes + 1000 * kv_bytes


def tiny(**facts: object) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
        **facts,
    }


def test_multi_query_and_per_layer_head_counts_are_read() -> None:
    assert shape_from_config(tiny(num_key_value_heads=1), "m").kv_bytes_per_token("bf16") == 128
    shape = shape_from_config(tiny(num_key_value_heads=[1, 4]), "m")
    assert shape.kv_bytes_per_token("bf16") == (1 + 4) * 2 * 16 * 2


def test_head_dim_is_not_taken_from_the_hidden_size_when_given() -> None:
    assert (
        shape_from_config(tiny(head_dim=40), "m").kv_bytes_per_token("bf16") == 2 * 2 * 2 * 40 * 2
    )


def test_layers_that_share_kv_keep_none_and_read_that_of_an_earlier_one() -> None:
    config = tiny(
        model_type="gemma4_text",
        num_hidden_layers=4,
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    shape = shape_from_config(config, "m")
    assert shape.kinds() == {"sliding": 1, "full": 1, "shared": 2}
    window, full = 2 * 2 * 16 * 2, 2 * 2 * 32 * 2
    assert shape.kv_bytes(100, "bf16") == 8 * window + 100 * full
    assert shape.kv_read_bytes(100, "bf16") == 2 * shape.kv_bytes(100, "bf16")


def test_puzzle_layers_without_attention_keep_nothing() -> None:
    blocks = [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.0}},
    ]
    config = tiny(model_type="nemotron-nas", block_configs=blocks, num_key_value_heads=None)
    shape = shape_from_config(config, "m")
    assert shape.kv_bytes_per_token("bf16") == 2 * 2 * 16 * 2
    assert [layer.attention.kind for layer in shape.layers] == [Kind.FULL, Kind.NONE]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny(model_type="qwen3_nxt"), "'qwen3_nxt' is not known.*qwen3_next"),
        (tiny(layer_types=["full_attention", "spiral_attention"]), "'spiral_attention'"),
        (tiny(layer_types=["full_attention"]), "1 layer_types for 2 layers"),
        (tiny(num_key_value_heads=3), "4 attention heads, which 3 KV heads do not divide"),
        (tiny(num_key_value_heads=[1, 2, 4]), "3 values for 2 layers"),
        (tiny(hidden_size=-1), "hidden_size is -1"),
        (tiny(hidden_size=None), "has no hidden_size"),
        (tiny(quantization_config={"quant_method": "mystery"}), "'mystery' is not known"),
        ({}, "no model_type"),
        ([], "no model_type"),
    ],
)
def test_config_that_is_not_understood_is_refused_by_name(config: object, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        shape_from_config(config, "m")  # type: ignore[arg-type]


def test_model_is_found_as_folder_and_as_file_and_else_near_names_are_given(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny()))
    assert load_model(str(tmp_path)).total_params == load_model(str(file)).total_params
    with pytest.raises(PlanError, match="near it: llama-3-70b"):
        load_model("llama-3-70")
    with pytest.raises(PlanError, match="nor in the hub cache"):
        load_model("nobody/nothing-at-all")
    file.write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        load_model(str(file))


def test_what_only_modelopt_tells_of_counts_and_weights_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    wide = load_model(str(tmp_path))

    def quantise(algorithm: str | None) -> None:
        quantization = {"quantization": {"quant_algo": algorithm}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))

    quantise("FP8")
    narrow = load_model(str(tmp_path))
    assert narrow.total_params == wide.total_params
    assert narrow.dense_bytes < wide.dense_bytes
    quantise(None)  # of KV alone
    assert load_model(str(tmp_path)).dense_bytes == wide.dense_bytes
    quantise("NVFP4")
    assert load_model(str(tmp_path)).dense_bytes < narrow.dense_bytes
    quantise("W4A8_AWQ")
    with pytest.raises(PlanError, match="modelopt's W4A8_AWQ is not known; name the weights"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), "fp8").dense_bytes == narrow.dense_bytes


def test_planning_imports_no_torch_and_no_numpy() -> None:
    code = (
        "import sys; from hotset.cli.plan import command\n"
        "command(['llama-3-8b', '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
