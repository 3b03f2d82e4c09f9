"""A small config of each family that the planner knows, and the model that transformers makes."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
INDEX = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
MAMBA = {
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
}
NEMOTRON = {
    **HEAD,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
}
KIMI = {"num_experts": 8, "linear_num_heads": 4, "linear_head_dim": 16}
ONE_EACH = ["mamba", "mamba", "attention", "mamba", "mamba", "attention"]

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 8}),
    ("ministral", HEAD),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    ("qwen3", HEAD),
    ("phi3", {}),
    ("granite", {}),
    ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("smollm3", {}),
    ("gemma", {**HEAD, "num_key_value_heads": 1}),
    ("gemma2", {**HEAD, "sliding_window": 8}),
    ("gemma3_text", {**HEAD, "sliding_window": 8}),
    ("olmo2", {}),
    ("olmo3", {"sliding_window": 8}),
    ("cohere2", {"sliding_window": 8}),
    ("starcoder2", {"sliding_window": 8, "use_bias": True}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    ("qwen3_moe", {**HEAD, **MOE, "decoder_sparse_step": 2}),
    ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    ("gpt_oss", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    ("glm4_moe", {**HEAD, **MLA, "num_key_value_heads": 2, "use_qk_norm": False}),
    ("deepseek_v2", MLA),
    ("deepseek_v2", {**MLA, "q_lora_rank": None}),
    ("deepseek_v3", {**MLA, "n_group": 4, "topk_group": 2}),
    (
        "deepseek_v32",
        {**MLA, **INDEX, "n_group": 4, "topk_group": 2},
    ),
    ("glm_moe_dsa", {**MLA, **INDEX, "index_topk_pattern": "FSSSFS"}),
    ("glm_moe_dsa", {**MLA, **INDEX, "index_topk_freq": 3, "index_skip_topk_offset": 3}),
    ("glm4_moe_lite", MLA),
    ("hy_v4", {**MLA, **INDEX, "hc_mult": 3, "num_attention_heads": 4}),
    ("youtu", {**MLA, "q_lora_rank": None}),
    ("minicpm3", {**MLA, "v_head_dim": None, "mlp_bias": True}),
    ("axk1", {**MLA, "n_group": 4, "topk_group": 2}),
    (
        "longcat_flash",
        {
            **MLA,
            "num_layers": 3,
            "ffn_hidden_size": 80,
            "expert_ffn_hidden_size": 24,
            "moe_topk": 2,
            "zero_expert_num": 4,
        },
    ),
    (
        "llama4_text",
        {
            **HEAD,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
    ),
    ("qwen3_next", {**HEAD, **MOE, **LINEAR, "shared_expert_intermediate_size": 40}),
    ("qwen3_5_text", {**HEAD, **LINEAR}),
    ("lfm2", {"full_attn_idxs": [2, 5]}),
    (
        "lfm2",
        {
            "layer_types": ["conv", "conv", "full_attention"] * 2,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.5,
            "conv_bias": True,
            "conv_L_cache": 4,
        },
    ),
    ("lfm2", {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False}),
    (
        "lfm2_moe",
        {
            **MOE,
            "num_dense_layers": 1,
            "layer_types": ["conv", "conv", "full_attention"] * 2,
            "conv_bias": True,
        },
    ),
    ("olmo_hybrid", {"attention_bias": True}),
    ("olmo_hybrid", {**LINEAR, "layer_types": ["linear_attention", "full_attention"] * 3}),
    ("falcon_h1", {**MAMBA, "mamba_d_ssm": 96, "mamba_rms_norm": True, "attention_bias": True}),
    ("falcon_h1", {**MAMBA, "mamba_d_ssm": None, "mamba_proj_bias": True, "mlp_bias": True}),
    ("falcon_h1", {**MAMBA, "mamba_d_ssm": 96, "projectors_bias": True}),
    ("nemotron_h", {**NEMOTRON, "hybrid_override_pattern": "MEM*-E"}),
    (
        "nemotron_h",
        {
            **NEMOTRON,
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "moe_latent_size": 24,
            "mlp_bias": True,
            "use_bias": True,
            "use_conv_bias": False,
        },
    ),
    ("kimi_linear", {**MLA, **KIMI, "q_lora_rank": None}),
    (
        "kimi_linear",
        {
            **MLA,
            **KIMI,
            "mlp_layer_types": ["dense", "sparse"] * 3,
            "linear_attn_config": {
                "full_attn_layers": [2, 6],
                "kda_layers": [1, 3, 4, 5],
                "head_dim": 8,
                "num_heads": 6,
                "short_conv_kernel_size": 3,
            },
        },
    ),
    ("bamba", {**MAMBA, "attn_layer_indices": [2, 5]}),
    (
        "granitemoehybrid",
        {
            **MAMBA,
            "layer_types": ONE_EACH,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
        },
    ),
    (
        "jamba",
        {
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
        },
    ),
    (
        "jamba",
        {
            "mamba_d_state": 8,
            "mamba_d_conv": 3,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "num_experts": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    ("mamba2", {"num_heads": 12, "head_dim": 8, "state_size": 16, "n_groups": 2}),
    (
        "gemma4_text",
        {
            **HEAD,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    # Fields that are seldom set: found by `benchmarks/planner_fields.py`.
    ("ministral3", HEAD),
    ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 40, "qkv_bias": False}),
    (
        "gpt_oss",
        {
            **HEAD,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "attention_bias": False,
        },
    ),
    ("glm4_moe", {**HEAD, **MLA, "num_key_value_heads": 2, "use_qk_norm": True}),
    ("deepseek_v2", {**MLA, "mlp_bias": True}),
    ("qwen3_5_text", {**HEAD, **LINEAR, "attention_bias": True}),
    ("qwen3_5_moe_text", {**HEAD, **MOE, **LINEAR, "shared_expert_intermediate_size": 40}),
    ("bamba", {**MAMBA, "attn_layer_indices": [2, 5], "mlp_bias": True}),
    (
        "gemma4_text",
        {
            **HEAD,
            "attention_bias": True,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "sliding_window": 8,
        },
    ),
]


def build(config: dict[str, Any], device: str) -> Any:
    text = config.get("text_config", config)
    facts = {k: v for k, v in text.items() if k not in ("quantization_config", "torch_dtype")}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
