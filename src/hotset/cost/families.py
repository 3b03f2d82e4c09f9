"""From the facts of a config.json to a `ModelShape`, by the family of models.

A vision tower is not counted. What is not known here is refused by name, never guessed.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

from hotset.cost.family_experts import deepseek_moe, gpt_oss_moe, mixtral_moe, olmoe_moe, qwen_moe
from hotset.cost.family_hybrids import (
    bamba,
    falcon_h1,
    jamba,
    kimi_linear,
    lfm2,
    lfm2_moe,
    mamba2_only,
    nemotron_h,
    olmo_hybrid,
    qwen3_next,
)
from hotset.cost.family_layers import (
    Llama,
    alternating,
    always_window,
    every,
    gemma4,
    gemma4_beside,
    llama4,
    nemotron_nas,
    qwen_window,
    starcoder2_beside,
)
from hotset.cost.family_mla import (
    Mla,
    full_indexers,
    glm_indexers,
    hy_beside,
    hy_indexers,
    longcat,
)
from hotset.cost.mixers import Config, Facts
from hotset.cost.params import FORMATS, Params, name_of
from hotset.cost.quantisation import modelopt_algorithm, stored_format
from hotset.cost.shape import Layer, ModelShape
from hotset.errors import PlanError

Builder = Callable[[Facts], list[Layer]]
Beside = Callable[[Facts, int], tuple[Params, Params]]


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one `model_type`.

    Attributes:
        layers: all layers of a model.
        defaults: of transformers' class, where the builder has another or none. Text parts of
            wrappers often lack such fields: transformers leaves out values that equal them.
        tied: the head is the embedding unless the config says otherwise.
        beside: what it holds more in its embedding and beside its layers, by its facts and their
            number.
    """

    layers: Builder
    defaults: Config = field(default_factory=dict)
    tied: bool = False
    beside: Beside | None = None


_MISTRAL = Llama(qkv_bias=False, out_bias=False, mlp_bias=False, window=always_window)
_DEEPSEEK = {"q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3}
_INDEX = {"index_topk": 2048, "index_head_dim": 128}

FAMILIES: dict[str, Family] = {
    "llama": Family(Llama()),
    "mistral": Family(_MISTRAL, {"sliding_window": 4096, "num_key_value_heads": 8}),
    "ministral3": Family(_MISTRAL, {"head_dim": 128, "num_key_value_heads": 8}),
    "ministral": Family(_MISTRAL, {"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family(
        Llama(qkv_bias=True, out_bias=False, mlp_bias=False, window=qwen_window),
        {"max_window_layers": 28},
    ),
    "qwen3": Family(
        Llama(qk_norm="head", mlp_bias=False, window=qwen_window),
        {"max_window_layers": 28, "head_dim": 128},
    ),
    "phi3": Family(_MISTRAL),
    "granite": Family(Llama()),
    "smollm3": Family(Llama(window=qwen_window), {"num_key_value_heads": 4}, tied=True),
    "gemma": Family(Llama(mlp_bias=False), {"head_dim": 256}, tied=True),
    "gemma2": Family(
        Llama(norms=4, mlp_bias=False, window=alternating),
        {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096},
        tied=True,
    ),
    "gemma3_text": Family(
        Llama(norms=4, qk_norm="head", mlp_bias=False, window=every("sliding_window_pattern", 6)),
        {
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "vocab_size": 262_208,
        },
        tied=True,
    ),
    "gemma4_text": Family(
        gemma4,
        {"num_key_value_heads": 4, "sliding_window": 512, "vocab_size": 262_144},
        tied=True,
        beside=gemma4_beside,
    ),
    "olmo2": Family(Llama(qk_norm="all", mlp_bias=False)),
    "olmo3": Family(
        Llama(qk_norm="all", mlp_bias=False, window=every("sliding_window_pattern", 4))
    ),
    "cohere2": Family(
        Llama(norms=1, mlp_bias=False, window=every("sliding_window_pattern", 4)), tied=True
    ),
    "starcoder2": Family(
        Llama(
            qkv_bias="use_bias",
            out_bias="use_bias",
            mlp_bias="use_bias",
            gated_mlp=False,
            layer_norm=True,
            window=always_window,
        ),
        {"use_bias": True, "num_key_value_heads": 2},
        tied=True,
        beside=starcoder2_beside,
    ),
    "mixtral": Family(
        Llama(qkv_bias=False, out_bias=False, moe=mixtral_moe, window=always_window),
        {"num_key_value_heads": 8},
    ),
    "granitemoe": Family(Llama(moe=mixtral_moe)),
    "qwen2_moe": Family(
        Llama(
            qkv_bias=("qkv_bias", True),
            out_bias=False,
            moe=qwen_moe,
            window=qwen_window,
            mlp_bias=False,
        ),
        {"max_window_layers": 28, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": Family(
        Llama(qk_norm="head", moe=qwen_moe, window=qwen_window, mlp_bias=False),
        {"num_key_value_heads": 4},
    ),
    "olmoe": Family(Llama(qk_norm="all", moe=olmoe_moe)),
    "gpt_oss": Family(
        Llama(
            qkv_bias=("attention_bias", True),
            out_bias=("attention_bias", True),
            sinks=True,
            moe=gpt_oss_moe,
            window=alternating,
        ),
        {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128},
    ),
    "glm4_moe": Family(
        Llama(out_bias=False, qk_norm_if="use_qk_norm", moe=deepseek_moe, mlp_bias=False),
        {"n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "deepseek_v2": Family(Mla(), {"q_lora_rank": 1536, "n_shared_experts": 2}),
    "deepseek_v3": Family(Mla(), _DEEPSEEK),
    "deepseek_v32": Family(
        Mla(indexers=full_indexers), {**_INDEX, **_DEEPSEEK, "index_n_heads": 64}
    ),
    "glm_moe_dsa": Family(
        Mla(indexers=glm_indexers),
        {**_INDEX, **_DEEPSEEK, "q_lora_rank": 2048, "index_n_heads": 32},
    ),
    "kimi_k2": Family(Mla()),
    "glm4_moe_lite": Family(Mla(), {"q_lora_rank": 768, "n_shared_experts": 1}),
    "youtu": Family(Mla(has_experts=False), {"q_lora_rank": 1536}, tied=True),
    "minicpm3": Family(Mla(has_experts=False), {"q_lora_rank": 768}, tied=True),
    "axk1": Family(
        Mla(moe_norm=True), {"q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 1}
    ),
    "hy_v4": Family(
        Mla(indexers=hy_indexers, gated=True, hyper=True),
        {**_INDEX, **_DEEPSEEK, "index_n_heads": 16},
        beside=hy_beside,
    ),
    "longcat_flash": Family(longcat, {"q_lora_rank": 1536, "zero_expert_num": 256}),
    "llama4_text": Family(llama4, {"head_dim": 128, "num_key_value_heads": 8}),
    "qwen3_next": Family(
        qwen3_next,
        {
            "head_dim": 256,
            "num_key_value_heads": 2,
            "num_experts": 512,
            "shared_expert_intermediate_size": 512,
        },
    ),
    "qwen3_5_text": Family(qwen3_next, {"head_dim": 256, "num_key_value_heads": 4}),
    "qwen3_5_moe_text": Family(
        qwen3_next,
        {
            "head_dim": 256,
            "num_key_value_heads": 2,
            "num_experts": 256,
            "shared_expert_intermediate_size": 512,
        },
    ),
    "lfm2": Family(lfm2, {"num_key_value_heads": 8}, tied=True),
    "lfm2_moe": Family(
        lfm2_moe,
        {
            "num_key_value_heads": 8,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1792,
        },
        tied=True,
    ),
    "olmo_hybrid": Family(olmo_hybrid),
    "bamba": Family(bamba, {"num_key_value_heads": 8}),
    "falcon_h1": Family(falcon_h1, {"num_key_value_heads": 8, "mamba_d_ssm": 1024}),
    "nemotron_h": Family(
        nemotron_h,
        {
            "head_dim": 128,
            "num_key_value_heads": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7688,
            "moe_shared_expert_intermediate_size": 7688,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
        },
    ),
    "kimi_linear": Family(
        kimi_linear,
        {
            "linear_num_heads": 32,
            "linear_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "granitemoehybrid": Family(bamba, {"num_local_experts": 8}),
    "jamba": Family(jamba, {"num_key_value_heads": 8}),
    "mamba2": Family(mamba2_only, {"n_groups": 8}),
    "nemotron-nas": Family(nemotron_nas),
}
# Of these defaults, the other name that transformers reads them under.
_ALIASES = {
    "num_experts": "num_local_experts",
    "n_routed_experts": "num_local_experts",
    "num_experts_per_tok": "num_experts_per_token",
}

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
    config, model_type = _text_part(config, name)
    family, f = _family(config, name, model_type)
    layers = _layers(family, f, name)
    hidden, vocab = f.count("hidden_size"), f.count("vocab_size")
    tied = bool(f.get("tie_word_embeddings", default=family.tied))
    embedding, other = family.beside(f, len(layers)) if family.beside else (Params(), Params())
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
        embedding=Params(vocab * hidden) + embedding,
        head=Params() if tied else Params(vocab * hidden),
        other=Params(vector=hidden) + other,
        plain_dtype=plain,
        quantised=quantised,
        expert_groups=groups,
        max_context=f.get("max_position_embeddings", default=None),
        source=source,
    )


def _text_part(config: Config, name: str) -> tuple[Config, str]:
    """The config of the text model, and its type."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise PlanError(f"config of {name} has no model_type; expected a transformers config.json")
    model_type: str = config["model_type"]
    if model_type not in _WRAPPERS:
        return config, model_type
    if not isinstance(config.get("text_config"), dict):
        raise PlanError(f"config of {name} is of type {model_type!r} but has no text_config")
    text = _text_config(config, name)
    return text, text.get("model_type") or _WRAPPERS[model_type]


def _family(config: Config, name: str, model_type: str) -> tuple[Family, Facts]:
    """What reads a config, and its facts with the defaults of transformers."""
    family = FAMILIES.get(model_type)
    if family is None:
        known = sorted({*FAMILIES, *_WRAPPERS})
        near = difflib.get_close_matches(model_type, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise PlanError(
            f"model type {model_type!r} is not known, so its KV and weights are not guessed{hint}; "
            f"known: {', '.join(known)}"
        )
    defaults = {
        field: value
        for field, value in family.defaults.items()
        if field not in config and _ALIASES.get(field) not in config
    }
    f = Facts({**defaults, **config}, model_type)
    if model_type != "gemma4_text" and f.get("per_layer_config", default=None):
        raise PlanError(
            f"config of {name} has per_layer_config, which is not known for {model_type}: its "
            "layers differ, so their sizes are not guessed"
        )
    return family, f


def _layers(family: Family, f: Facts, name: str) -> tuple[Layer, ...]:
    try:
        return tuple(family.layers(f))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PlanError(
            f"config of {name} ({f.model_type}) is not as transformers writes it: {error!r}"
        ) from error


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
    stored = stored_format(quant)
    if stored is None and method in ("awq", "gptq") and quant.get("bits", quant.get("w_bit")) == 4:
        stored = FORMATS["int4"]
    if stored is not None:
        parts = ("expert",) if method == "mxfp4" else ("attention", "mlp", "expert")  # of gpt-oss
        return _DTYPES[dtype], dict.fromkeys(parts, name_of(stored))
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
