"""Tiny random models of real architectures, built from their transformers configs."""

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

# Of experts: not in transformers 5.17.
HAS_POST_EXPERT_NORM = (
    "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters
)

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
# Widths that FlashInfer's kernels are made for; with sparse attention 24 tokens are selected.
WIDE: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
WIDE_SPARSE = {
    **WIDE,
    "index_head_dim": 128,
    "index_topk": 24,
    "mlp_layer_types": ["dense"] * 3,
}
_DEEPSEEK_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}

# What each family adds: the attention of the architecture in small.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "mistral": {"sliding_window": 12},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 12,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3_text": {
        "sliding_window": 12,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_oss": {
        "sliding_window": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "deepseek_v3": {**_MLA, **_DEEPSEEK_MOE, "n_group": 1, "topk_group": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}

# All that cache latents: rows of 24 numbers, and values narrower than keys in some.
LATENT_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_MLA, **_DEEPSEEK_MOE, "q_lora_rank": None, "v_head_dim": 12},
    "deepseek_v3": FAMILIES["deepseek_v3"],
    "glm4_moe_lite": {
        **_MLA,
        **_DEEPSEEK_MOE,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "youtu": _MLA,
    "minicpm3": {**_MLA, "dim_model_base": 64, "scale_depth": 1.7},
    "axk1": {**_MLA, **_DEEPSEEK_MOE, "n_group": 1, "topk_group": 1},
    "longcat_flash": {
        **_MLA,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
}

_DSA = {
    **FAMILIES["deepseek_v3"],
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 16,
}
# What the families with sparse attention add; of a token no more than 16 are selected.
SPARSE_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v32": _DSA,
    "glm_moe_dsa": {**_DSA, "indexer_types": ["full", "shared", "full"]},
    "hy_v4": {**_DSA, "indexer_types": ["full", "full", "shared"], "hc_mult": 2},
}

_GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_MOSTLY_LINEAR = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_MOSTLY_CONV = ["conv", "conv", "full_attention", "conv"]
# Those whose layers keep a state beside KV, or in its place.
HYBRID_FAMILIES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": _MOSTLY_CONV},
    "lfm2_moe": {"layer_types": _MOSTLY_CONV, "num_dense_layers": 1, **_MOE},
    "qwen3_next": {
        "layer_types": _MOSTLY_LINEAR,
        "shared_expert_intermediate_size": 32,
        **_GDN,
        **_MOE,
    },
    "qwen3_5_text": {"layer_types": _MOSTLY_LINEAR, **_GDN},
    "qwen3_5_moe_text": {
        "layer_types": _MOSTLY_LINEAR,
        "shared_expert_intermediate_size": 32,
        **_GDN,
        **_MOE,
    },
    "olmo_hybrid": {"layer_types": _MOSTLY_LINEAR, **_GDN, "linear_num_key_heads": 4},
    "granitemoehybrid": {
        "layer_types": _MOSTLY_LINEAR,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 40,
        **_MAMBA,
    },
    "nemotron_h": {
        "layer_types": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "bamba": {"attn_layer_indices": [2], **_MAMBA},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "kimi_linear": {
        **_MLA,
        "q_lora_rank": None,
        "layer_types": _MOSTLY_LINEAR,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
    },
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
    },
}
for _changes in HYBRID_FAMILIES.values():
    _changes.setdefault("num_hidden_layers", len(_changes.get("layer_types", _MOSTLY_CONV)))


def make_config(family: str, **changes: Any) -> Any:
    """The transformers config of a tiny model of `family`."""
    own = {**HYBRID_FAMILIES, **SPARSE_FAMILIES, **LATENT_FAMILIES, **FAMILIES}[family]
    values = {**_COMMON, "model_type": family, **own, **changes}
    return AutoConfig.for_model(**values)


def make_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny float32 model of `family` with random weights, large enough to vary its output.

    Recurrent layers remember their first tokens to the end: their decay is slow.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-4.5, -2.5)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "sinks" in name:
                parameter.normal_(0, 1.0)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.zero_()
    return model.eval()
