"""From the facts of a config.json to a `ModelShape`, by the family of models.

A vision tower is not counted. What is not known here is refused by name, never guessed.
"""

import difflib
from collections.abc import Callable

from hotset.cost.family_experts import deepseek_moe, gpt_oss_moe, mixtral_moe, olmoe_moe, qwen_moe
from hotset.cost.family_layers import (
    Llama,
    alternating,
    always_window,
    bamba,
    deepseek,
    every,
    gemma4,
    jamba,
    llama4,
    mamba2_only,
    nemotron_nas,
    qwen3_next,
    qwen_window,
)
from hotset.cost.mixers import Config, Facts
from hotset.cost.params import Params
from hotset.cost.quantisation import modelopt_algorithm
from hotset.cost.shape import Layer, ModelShape
from hotset.errors import PlanError

Builder = Callable[[Facts], list[Layer]]

FAMILIES: dict[str, Builder] = {
    "llama": Llama().layers,
    "mistral": Llama(qkv_bias=False, out_bias=False, mlp_bias=False, window=always_window).layers,
    "ministral3": Llama(
        qkv_bias=False, out_bias=False, mlp_bias=False, window=always_window
    ).layers,
    "ministral": Llama(qkv_bias=False, out_bias=False, mlp_bias=False, window=always_window).layers,
    "qwen2": Llama(qkv_bias=True, out_bias=False, mlp_bias=False, window=qwen_window).layers,
    "qwen3": Llama(qk_norm="head", mlp_bias=False, window=qwen_window).layers,
    "phi3": Llama(qkv_bias=False, out_bias=False, mlp_bias=False, window=always_window).layers,
    "granite": Llama().layers,
    "smollm3": Llama(window=qwen_window).layers,
    "gemma": Llama(mlp_bias=False).layers,
    "gemma2": Llama(norms=4, mlp_bias=False, window=alternating).layers,
    "gemma3_text": Llama(
        norms=4,
        qk_norm="head",
        mlp_bias=False,
        window=every("sliding_window_pattern", 6),
    ).layers,
    "gemma4_text": gemma4,
    "olmo2": Llama(qk_norm="all", mlp_bias=False).layers,
    "olmo3": Llama(qk_norm="all", mlp_bias=False, window=every("sliding_window_pattern", 4)).layers,
    "cohere2": Llama(norms=1, mlp_bias=False, window=every("sliding_window_pattern", 4)).layers,
    "starcoder2": Llama(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        gated_mlp=False,
        layer_norm=True,
        window=always_window,
    ).layers,
    "mixtral": Llama(qkv_bias=False, out_bias=False, moe=mixtral_moe, window=always_window).layers,
    "granitemoe": Llama(moe=mixtral_moe).layers,
    "qwen2_moe": Llama(
        qkv_bias=("qkv_bias", True),
        out_bias=False,
        moe=qwen_moe,
        window=qwen_window,
        mlp_bias=False,
    ).layers,
    "qwen3_moe": Llama(qk_norm="head", moe=qwen_moe, window=qwen_window, mlp_bias=False).layers,
    "olmoe": Llama(qk_norm="all", moe=olmoe_moe).layers,
    "gpt_oss": Llama(
        qkv_bias=("attention_bias", True),
        out_bias=("attention_bias", True),
        sinks=True,
        moe=gpt_oss_moe,
        window=alternating,
    ).layers,
    "glm4_moe": Llama(
        out_bias=False, qk_norm_if="use_qk_norm", moe=deepseek_moe, mlp_bias=False
    ).layers,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "deepseek_v32": deepseek,
    "glm_moe_dsa": deepseek,
    "kimi_k2": deepseek,
    "llama4_text": llama4,
    "qwen3_next": qwen3_next,
    "qwen3_5_text": qwen3_next,
    "qwen3_5_moe_text": qwen3_next,
    "bamba": bamba,
    "granitemoehybrid": bamba,
    "jamba": jamba,
    "mamba2": mamba2_only,
    "nemotron-nas": nemotron_nas,
}

# Defaults of transformers' classes that differ from the builders'. Text parts of wrappers often
# lack such fields: transformers leaves out values that equal the class's default.
_DEFAULTS: dict[str, Config] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "ministral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "ministral3": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen2": {"max_window_layers": 28},
    "qwen3": {"max_window_layers": 28, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096},
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "vocab_size": 262_208,
    },
    "gemma4_text": {"num_key_value_heads": 4, "sliding_window": 512, "vocab_size": 262_144},
    "starcoder2": {"use_bias": True, "num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2_moe": {"max_window_layers": 28, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128},
    "glm4_moe": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v2": {"q_lora_rank": 1536, "n_shared_experts": 2},
    "deepseek_v3": {"q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3},
    "deepseek_v32": {
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    },
    "glm_moe_dsa": {
        "q_lora_rank": 2048,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "index_topk": 2048,
        "index_n_heads": 32,
        "index_head_dim": 128,
    },
    "llama4_text": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen3_next": {
        "head_dim": 256,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3_5_text": {"head_dim": 256, "num_key_value_heads": 4},
    "qwen3_5_moe_text": {
        "head_dim": 256,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "shared_expert_intermediate_size": 512,
    },
    "bamba": {"num_key_value_heads": 8},
    "granitemoehybrid": {"num_local_experts": 8},
    "jamba": {"num_key_value_heads": 8},
    "mamba2": {"n_groups": 8},
}
# Of these, the other name that transformers reads them under.
_ALIASES = {"num_experts": "num_local_experts"}

# Types whose head is the embedding unless the config says otherwise.
_TIED = {"gemma", "gemma2", "gemma3_text", "gemma4_text", "cohere2", "starcoder2", "smollm3"}

# Configs that wrap a text model beside a vision or audio one; its type, where it names none.
_WRAPPERS = {
    "llama4": "llama4_text",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}

# What a wrapper may say of its text model.
_OF_WRAPPER = ("torch_dtype", "dtype", "quantization_config")
# Wrappers that have the head, so that transformers heeds their own flag alone: whether it is set by
# default. Where it is, and a checkpoint has a head of its own all the same, the head stays untied.
_HAVE_HEAD = {
    "gemma3": True,
    "gemma4": True,
    "mistral3": True,
    "qwen3_5": False,
    "qwen3_5_moe": False,
}

_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def shape_from_config(config: Config, name: str, source: str = "") -> ModelShape:
    """Build the shape of the text model that a config.json describes.

    Args:
        config: the parsed config.json.
        name: what to call the model.
        source: where the config came from, for the reader.

    Raises:
        PlanError: the model type, an attention type or a quantisation is not known, or a field
            is missing or makes no sense.
    """
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise PlanError(f"config of {name} has no model_type; expected a transformers config.json")
    model_type: str = config["model_type"]
    outer = config
    if model_type in _WRAPPERS:
        if not isinstance(config.get("text_config"), dict):
            raise PlanError(f"config of {name} is of type {model_type!r} but has no text_config")
        config = _text_config(outer, name)
        model_type = config.get("model_type") or _WRAPPERS[model_type]
    build = FAMILIES.get(model_type)
    if build is None:
        known = sorted({*FAMILIES, *_WRAPPERS})
        near = difflib.get_close_matches(model_type, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise PlanError(
            f"model type {model_type!r} is not known, so its KV and weights are not guessed{hint}; "
            f"known: {', '.join(known)}"
        )
    defaults = {
        name: value
        for name, value in _DEFAULTS.get(model_type, {}).items()
        if name not in config and _ALIASES.get(name) not in config
    }
    f = Facts({**defaults, **config}, model_type)
    if model_type != "gemma4_text" and f.get("per_layer_config", default=None):
        raise PlanError(
            f"config of {name} has per_layer_config, which is not known for {model_type}: its "
            "layers differ, so their sizes are not guessed"
        )
    try:
        layers = tuple(build(f))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PlanError(
            f"config of {name} ({model_type}) is not as transformers writes it: {error!r}"
        ) from error
    hidden, vocab = f.count("hidden_size"), f.count("vocab_size")
    tied = bool(f.get("tie_word_embeddings", default=model_type in _TIED))
    embedding = Params(vocab * hidden)
    other = Params(vector=hidden * (2 if model_type == "starcoder2" else 1))
    per_layer_width = f.get("hidden_size_per_layer_input", default=256)
    if model_type == "gemma4_text" and per_layer_width:
        width = len(layers) * per_layer_width
        embedding += Params(f.count("vocab_size_per_layer_input", default=262_144) * width)
        other += Params(hidden * width, per_layer_width)
    groups = None
    if f.get("n_group", default=1) > 1 and f.get("topk_group", default=0):
        groups = (f.count("n_group"), f.count("topk_group"))
    plain, quantised = _storage(f)
    return ModelShape(
        name=name,
        model_type=model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        layers=layers,
        embedding=embedding,
        head=Params() if tied else Params(vocab * hidden),
        other=other,
        plain_dtype=plain,
        quantised=quantised,
        expert_groups=groups,
        max_context=f.get("max_position_embeddings", default=None),
        source=source,
    )


def _text_config(outer: Config, name: str) -> Config:
    """The text model's part of a wrapper's config, with what the wrapper says of it.

    Where neither has a flag the text model's default holds: Mistral's published wrappers have none,
    and a head of their own in the checkpoint.
    """
    text: Config = outer["text_config"]
    config = {**{k: v for k, v in outer.items() if k in _OF_WRAPPER}, **text}
    is_default = _HAVE_HEAD.get(outer["model_type"])
    if is_default is None:
        return config
    tied, inner = outer.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if tied is not None:
        config["tie_word_embeddings"] = tied
    elif inner and not is_default:
        raise PlanError(
            f"config of {name} has tie_word_embeddings in text_config only, where transformers "
            f"does not look for it; expected it beside text_config, too"
        )
    return config


def _storage(f: Facts) -> tuple[str, dict[str, str]]:
    """The 16- or 32-bit dtype of a checkpoint, and what it stores quantised."""
    dtype = f.get("torch_dtype", "dtype", default="bfloat16")
    if dtype not in _DTYPES:
        raise PlanError(f"config field torch_dtype is {dtype!r}; known: {', '.join(_DTYPES)}")
    quant = f.get("quantization_config", default=None)
    if quant is None:
        return _DTYPES[dtype], {}
    method = quant.get("quant_method")
    everything = ("attention", "mlp", "expert")
    if method == "fp8" or method == "fbgemm_fp8":
        stored = "fp8_block" if quant.get("weight_block_size") else "fp8"
        return _DTYPES[dtype], dict.fromkeys(everything, stored)
    if method == "modelopt" and modelopt_algorithm(quant) == "FP8":
        return _DTYPES[dtype], dict.fromkeys(everything, "fp8")
    if method == "mxfp4":  # gpt-oss: experts only
        return _DTYPES[dtype], {"expert": "mxfp4"}
    if method in ("awq", "gptq") and quant.get("bits", quant.get("w_bit", 4)) == 4:
        return _DTYPES[dtype], dict.fromkeys(everything, "int4")
    name = f"modelopt's {modelopt_algorithm(quant)}" if method == "modelopt" else repr(method)
    if method is None:
        name = "without quant_method (of MLX, say)"
    raise PlanError(f"quantisation {name} is not known; name the weights' dtype yourself")


def layer_summary(shape: ModelShape) -> str:
    """One line on the layers, for reports."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in shape.kinds().items())
    moe = len(shape.moe_layers)
    if not moe:
        return f"{len(shape.layers)} layers ({kinds})"
    experts = f"{moe} with {shape.num_experts} experts, top-{shape.top_k_experts}"
    return f"{len(shape.layers)} layers ({kinds}; {experts})"
