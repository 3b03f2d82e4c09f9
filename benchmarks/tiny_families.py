"""A tiny random model of any family of the installed transformers, by shrinking its default config.

Sizes are recognised by their names; lists with a value of each layer are cut to the layers that are
kept, one of each kind first. What names do not tell is in `OVERRIDES`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

NUM_LAYERS = 4
VOCAB_SIZE = 128
# Token ids that a family gives a meaning of its own start here; prompts stay below.
FIRST_SPECIAL_ID = 100

_HIDDEN, _HEADS, _HEAD_DIM, _FFN = 64, 4, 16, 96

_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "layers",
    "depth",
    "num_blocks",
    "encoder_depth",
)

_SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "embed_dim",
            "embedding_size",
            "dim",
            "out_hidden_size",
            "text_hidden_size",
            "projection_dim",
            "word_embed_proj_dim",
            "hidden_dim",
            "rotary_dim_total",
            "text_dim",
            "adapter_out_dim",
            "width",
            "lm_hidden_size",
            "emb_dim",
            "vision_output_dim",
        ),
        _HIDDEN,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "swa_num_attention_heads",
            "resampler_n_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim"),
        _HEAD_DIM,
    ),
    **dict.fromkeys(
        ("swa_v_head_dim", "resampler_head_dim", "index_head_dim", "attention_head_dim"), _HEAD_DIM
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "global_head_dim": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "d_ff",
            "ffn_hidden_size",
            "n_inner",
            "dim_ff",
            "mlp_dim",
            "projector_hidden_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "projection_hidden_dim",
            "projector_intermediate_size",
            "adapter_intermediate_size",
        ),
        _FFN,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_intermediate_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "moe_n_routed_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_k",
            "moe_topk",
            "moe_top_k",
            "top_k_experts",
            "experts_per_token",
            "num_selected_experts",
        ),
        2,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_num_hidden_layers"), 0),
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    "original_max_position_embeddings": 256,
    "sliding_window": 12,
    "sliding_window_size": 12,
    "window_size": 12,
    "attention_chunk_size": 12,
    "query_pre_attn_scalar": _HEAD_DIM,
    "rotary_dim": 8,
    "altup_num_inputs": 2,
    "laurel_rank": 8,
    "ngram_vocab_size_base": 64,
    "index_topk": 8,
    # Fewer heads give scores of 0, and of equal scores transformers selects any.
    "index_n_heads": 16,
    # Of towers, which only have to be built.
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "posemb_grid_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "num_mel_bins": 16,
    "max_source_positions": 64,
    "output_channels": 16,
    "mm_tokens_per_image": 4,
    "image_seq_length": 4,
    "num_image_tokens": 4,
    # Recurrent parts.
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "lru_width": _HIDDEN,
    "attention_hidden_size": _HIDDEN,
}

# Further values of a family, by the path to them; applied last.
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 3, 3]}
_HALF_MROPE = _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
_BY_TYPE = {
    "sliding_attention": {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
    },
    "full_attention": {"rope_theta": 50000.0, "rope_type": "default", "mrope_section": [2, 3, 3]},
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "cohere_compass": {"text_config.rope_parameters": _BY_TYPE},
    "cohere_compass_text": {"rope_parameters": _BY_TYPE},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "chameleon": {"vocabulary_map": {"<image>": FIRST_SPECIAL_ID}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]},
        "text_config.moe_intermediate_size": [32, 32],
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [_FFN, 64, _FFN, 64],
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
    },
    "hunyuan_vl": {"text_config.rope_parameters": _MROPE | {"mrope_section": [2, 2, 2, 2]}},
    **{
        name: {"text_config.rope_parameters": _MROPE}
        for name in (
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_5_vl",
            "qwen2_vl",
        )
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_key_value_heads": 2,
        "num_dense_layers": 1,
    },
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "nemotron": {"num_key_value_heads": 2},
    **{
        name: {
            "vision_start_token_id": FIRST_SPECIAL_ID + 9,
            "text_config.rope_parameters": _MROPE,
        }
        for name in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    },
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "step3p7": {"text_config.sliding_window": 12},
    "glm4v_moe": {"text_config.rope_parameters": _HALF_MROPE},
}


def families() -> dict[str, str]:
    """Each model type of causal language models, then of multimodal wrappers; and which it is."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wrappers = {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    found = dict.fromkeys(causal, "causal")
    return found | {name: "wrapper" for name in wrappers if name not in found}


def model_class(model_type: str) -> Any:
    """The class that transformers' tables name."""
    names = (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        | modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        | modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    name = names[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def tiny_config(model_type: str) -> Any:
    """The default config of a family in small."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    values = _shrink(config_class().to_dict(), {})
    for path, value in OVERRIDES.get(model_type, {}).items():
        *parents, name = path.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        if value is None:
            place.pop(name, None)
        else:
            place[name] = value
    return config_class(**values)


def tiny_model(model_type: str, *, seed: int = 0) -> Any:
    """A float32 model with weights large enough that its answers vary."""
    torch.manual_seed(seed)
    made_by, config = model_class(model_type), tiny_config(model_type)
    if made_by.config_class is type(config.get_text_config()):
        config = config.get_text_config()
    model = made_by._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "sink" in name:
                parameter.normal_(0, 1.0)
    model.tie_weights()
    return model.eval()


def _shrink(values: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    kept = _kept_layers(values)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str):  # of a table that is no config
            small[name] = value
            continue
        if name in ("id2label", "label2id", "transformers_version", "per_layer_config"):
            continue
        small[name] = _small(name, value, values, kept, ids)
    if "per_layer_config" in values and isinstance(values["per_layer_config"], dict):
        small["per_layer_config"] = _of_layers(values["per_layer_config"], kept, ids)
    return small


def _small(
    name: str, value: Any, values: dict[str, Any], kept: list[int], ids: dict[str, int]
) -> Any:
    if isinstance(value, dict):
        if name in ("rope_parameters", "rope_scaling"):
            return _small_rope(value, values)
        return _shrink(value, ids)
    if _is_token_id(name) and value is not None:
        return [_token_id(name, ids)] if isinstance(value, list) else _token_id(name, ids)
    if name in _LAYER_COUNTS and isinstance(value, int):
        return len(kept)
    if name == "num_key_value_heads" or name.endswith("_key_value_heads"):
        if not isinstance(value, int):
            return value
        heads = values.get("num_attention_heads") or value
        return 2 if isinstance(heads, int) and value < heads else _HEADS
    if name == "head_dim" and (rotated := values.get("qk_rope_head_dim")):
        widths = {rotated: 8, rotated + (values.get("qk_nope_head_dim") or 0): 24}
        return widths.get(value, _HEAD_DIM)
    if name == "head_dim" and value is None:
        return _HEAD_DIM
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, list | tuple):
        if len(value) == _num_layers(values) and len(value) > 2:
            cut = [value[i] for i in kept]
            return [_small(name, item, values, kept, ids) for item in cut]
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return _small_list(name, value)
        return value
    if is_number and name in _SIZES and value > 0:
        return min(value, _SIZES[name]) if _SIZES[name] < 100 else _SIZES[name]
    return value


def _small_list(name: str, value: list[int]) -> list[int]:
    if name in _SIZES:
        return [_SIZES[name] for _ in value]
    if "index" in name or name.endswith("_layers") or name.endswith("_idxs"):
        return [i for i in value if i < 2] or ([1] if value else [])
    return list(value)


def _small_rope(value: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(part, dict) for part in value.values()):
        return {
            name: _small_rope(part, values) if isinstance(part, dict) else part
            for name, part in value.items()
        }
    small = dict(value)
    rotated = int(_rotated_dims(values) * float(value.get("partial_rotary_factor") or 1)) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(value.get(name), list):
            small[name] = (value[name] * rotated)[:rotated]
    section = value.get("mrope_section")
    if isinstance(section, list):
        share = rotated // len(section)
        small["mrope_section"] = [rotated - share * (len(section) - 1)] + [share] * (
            len(section) - 1
        )
    if "original_max_position_embeddings" in value:
        small["original_max_position_embeddings"] = 256
    return small


def _rotated_dims(values: dict[str, Any]) -> int:
    if values.get("qk_rope_head_dim"):
        return _SIZES["qk_rope_head_dim"]
    return _HEAD_DIM


def _of_layers(values: dict[Any, Any], kept: list[int], ids: dict[str, int]) -> dict[str, Any]:
    """`per_layer_config`, whose keys are layers' numbers or types."""
    small = {}
    for key, part in values.items():
        inner = _shrink(part, ids) if isinstance(part, dict) else part
        if str(key).isdigit():
            if int(key) in kept:
                small[str(kept.index(int(key)))] = inner
        else:
            small[key] = inner
    return small


def _num_layers(values: dict[str, Any]) -> int:
    for name in _LAYER_COUNTS:
        if isinstance(values.get(name), int):
            return int(values[name])
    return 0


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """Which layers stay, in order: the first of each kind, then the first ones."""
    num_layers = _num_layers(values)
    lists = [
        value
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == num_layers and _is_kind(value)
    ]
    kinds: dict[Any, int] = {}
    for layer in range(num_layers):
        kinds.setdefault(tuple(str(value[layer]) for value in lists), layer)
    chosen: Iterable[int] = [*kinds.values(), *range(num_layers)]
    return sorted(list(dict.fromkeys(chosen))[:NUM_LAYERS])


def _is_kind(value: list[Any] | tuple[Any, ...]) -> bool:
    return 1 < len({str(item) for item in value}) <= NUM_LAYERS


def _is_token_id(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index", "_token_ids"))


def _token_id(name: str, ids: dict[str, int]) -> int:
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in fixed:
        return fixed[name]
    plain = name.removeprefix("_").replace("_index", "_id").removesuffix("_id")
    return ids.setdefault(plain, FIRST_SPECIAL_ID + len(ids))
