"""From the facts of a config.json to a `ModelShape`: one builder for each family of models.

Counts follow the parameters that `transformers` creates for the text model; a vision tower is not
counted. What is not known here is refused by name, never guessed.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from hotset.errors import PlanError
from hotset.plan.mixers import (
    WINDOWS,
    Config,
    Facts,
    gated_delta_net,
    gqa,
    layer_types,
    mamba1,
    mamba2,
    mla,
    mlp_params,
    windowed,
)
from hotset.plan.quantisation import modelopt_algorithm
from hotset.plan.shape import Attention, Kind, Layer, ModelShape, Params

# -- families -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Llama:
    """Families that differ from Llama in biases, norms and windows only."""

    qkv_bias: bool | str = "attention_bias"  # a field name is read from the config
    out_bias: bool | str = "attention_bias"
    qk_norm: str = ""
    norms: int = 2  # of the hidden width, a layer
    gated_mlp: bool = True
    mlp_bias: bool | str = "mlp_bias"
    layer_norm: bool = False  # norms with a bias
    moe: Callable[[Facts, int], tuple[Params, Params, Params, int, int] | None] | None = None
    window: Callable[[Facts], list[str]] | None = None
    sinks: bool = False

    def layers(self, f: Facts) -> list[Layer]:
        """All layers of the model."""

        def flag(value: bool | str) -> bool:
            return bool(f.get(value, default=False)) if isinstance(value, str) else value

        types = layer_types(f, tuple(WINDOWS), self.window(f) if self.window else None)
        norms = Params(vector=self.norms * f.count("hidden_size") * (2 if self.layer_norm else 1))
        result = []
        for index, layer_type in enumerate(types):
            attention = gqa(
                f,
                index,
                qkv_bias=flag(self.qkv_bias),
                out_bias=flag(self.out_bias),
                qk_norm=self.qk_norm,
                sinks=self.sinks,
                **windowed(f, layer_type),
            )
            moe = self.moe(f, index) if self.moe else None
            if moe:
                router, expert, shared, num_experts, top_k = moe
                result.append(Layer(attention, shared, norms, router, expert, num_experts, top_k))
            else:
                width = f.per_layer("intermediate_size", index)
                mlp = mlp_params(f, width, gated=self.gated_mlp, bias=flag(self.mlp_bias))
                result.append(Layer(attention, mlp, norms))
        return result


def _always_window(f: Facts) -> list[str]:
    """Mistral: one window for all layers, or none."""
    windowed = f.get("sliding_window", default=None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * f.count("num_hidden_layers")


def _qwen_window(f: Facts) -> list[str]:
    """Qwen: full attention up to `max_window_layers`, a window from there on, if switched on."""
    num_layers = f.count("num_hidden_layers")
    if not f.get("use_sliding_window", default=False):
        return ["full_attention"] * num_layers
    first = f.count("max_window_layers", default=num_layers, least=0)
    return ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]


def _every(pattern_field: str, default: int) -> Callable[[Facts], list[str]]:
    """Each n-th layer full, the others with a window."""

    def types(f: Facts) -> list[str]:
        n = f.count(pattern_field, default=default)
        return [
            "sliding_attention" if (i + 1) % n else "full_attention"
            for i in range(f.count("num_hidden_layers"))
        ]

    return types


def _alternating(f: Facts) -> list[str]:
    """gpt-oss and Gemma 2: window, full, window, full."""
    return [
        "full_attention" if i % 2 else "sliding_attention"
        for i in range(f.count("num_hidden_layers"))
    ]


Moe = tuple[Params, Params, Params, int, int]


def _moe(f: Facts, num: int, top_k: int, width: int, *, shared: Params | None = None) -> Moe:
    """Router, one expert, shared part, experts, top-k."""
    if top_k > num:
        raise PlanError(f"config routes each token to {top_k} of {num} experts")
    router = Params(f.count("hidden_size") * num)
    return router, mlp_params(f, width), shared or Params(), num, top_k


def _mixtral_moe(f: Facts, index: int) -> Moe:
    return _moe(
        f,
        f.count("num_local_experts"),
        f.count("num_experts_per_tok"),
        f.count("intermediate_size"),
    )


def _olmoe_moe(f: Facts, index: int) -> Moe:
    return _moe(
        f, f.count("num_experts"), f.count("num_experts_per_tok"), f.count("intermediate_size")
    )


def _qwen_moe(f: Facts, index: int) -> Moe | None:
    """Qwen MoE: a dense MLP where `mlp_only_layers` or the sparse step says so."""
    step = f.count("decoder_sparse_step", default=1)
    if index in f.get("mlp_only_layers", default=[]) or (index + 1) % step:
        return None
    shared_width = f.get("shared_expert_intermediate_size", default=0)
    shared = Params()
    if shared_width:
        shared = mlp_params(f, shared_width) + Params(f.count("hidden_size"))  # and its gate
    return _moe(
        f,
        f.count("num_experts", "num_local_experts"),  # the hub's files, and transformers' own dict
        f.count("num_experts_per_tok"),
        f.count("moe_intermediate_size"),
        shared=shared,
    )


def _deepseek_moe(f: Facts, index: int) -> Moe | None:
    """DeepSeek and GLM: dense first layers, then routed and shared experts."""
    if index < f.count("first_k_dense_replace", default=0, least=0):
        return None
    if index % f.count("moe_layer_freq", default=1):
        return None
    width = f.count("moe_intermediate_size")
    shared = mlp_params(f, width * f.count("n_shared_experts", default=0, least=0))
    return _moe(
        f, f.count("n_routed_experts"), f.count("num_experts_per_tok"), width, shared=shared
    )


def _gpt_oss_moe(f: Facts, index: int) -> Moe:
    """gpt-oss: router and experts have biases."""
    hidden, width = f.count("hidden_size"), f.count("intermediate_size")
    num = f.count("num_local_experts", "num_experts")
    router, expert, shared, num, top_k = _moe(
        f, num, f.count("num_experts_per_tok", "experts_per_token"), width
    )
    return (
        router + Params(vector=num),
        expert + Params(vector=2 * width + hidden),
        shared,
        num,
        top_k,
    )


def _qwen3_next(f: Facts) -> list[Layer]:
    """Qwen3-Next and 3.5: three gated DeltaNet layers, then one of gated full attention."""
    interval = f.count("full_attention_interval", default=4)
    default = [
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(f.count("num_hidden_layers"))
    ]
    norms = Params(vector=2 * f.count("hidden_size"))
    result = []
    for index, layer_type in enumerate(
        layer_types(f, ("full_attention", "linear_attention"), default)
    ):
        if layer_type == "linear_attention":
            attention = gated_delta_net(f)
        else:
            bias = bool(f.get("attention_bias", default=False))
            attention = gqa(f, index, qk_norm="head", gated=True, qkv_bias=bias, out_bias=bias)
        has_experts = f.get("num_experts", "num_local_experts", default=0)
        moe = _qwen_moe(f, index) if has_experts else None
        if moe:
            router, expert, shared, num_experts, top_k = moe
            result.append(Layer(attention, shared, norms, router, expert, num_experts, top_k))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
    return result


def _bamba(f: Facts) -> list[Layer]:
    """Bamba and Granite 4 hybrids: Mamba-2 layers with a few of attention between."""
    moe_width = f.get("num_local_experts", default=0)
    default = None
    if f.get("layer_types", "layers_block_type", default=None) is None:
        attn = f.get("attn_layer_indices", default=[])
        default = [
            "full_attention" if i in attn else "linear_attention"
            for i in range(f.count("num_hidden_layers"))
        ]
    elif f.get("layer_types", default=None) is None:
        default = f.get("layers_block_type")
    heads = f.count("mamba_n_heads")
    expand = f.count("mamba_expand", default=2)
    mamba = mamba2(
        f,
        width=expand * f.count("hidden_size"),
        heads=heads,
        state=f.count("mamba_d_state"),
        groups=f.count("mamba_n_groups", default=1),
        kernel=f.count("mamba_d_conv", default=4),
        conv_bias=bool(f.get("mamba_conv_bias", default=True)),
        proj_bias=bool(f.get("mamba_proj_bias", default=False)),
    )
    norms = Params(vector=2 * f.count("hidden_size"))
    bias = bool(f.get("attention_bias", default=False))
    result = []
    for index, layer_type in enumerate(
        layer_types(f, ("full_attention", "linear_attention"), default)
    ):
        attention = (
            gqa(f, index, qkv_bias=bias, out_bias=bias) if layer_type == "full_attention" else mamba
        )
        if f.model_type == "granitemoehybrid":
            shared = mlp_params(f, f.count("shared_intermediate_size"))
            if moe_width:
                router, expert, _, num, top_k = _mixtral_moe(f, index)
                result.append(Layer(attention, shared, norms, router, expert, num, top_k))
            else:
                result.append(Layer(attention, shared, norms))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
    return result


def _jamba(f: Facts) -> list[Layer]:
    """Jamba: attention each `attn_layer_period` layers, Mamba between, experts each second."""
    period, offset = (
        f.count("attn_layer_period", default=8),
        f.count("attn_layer_offset", default=4, least=0),
    )
    e_period = f.count("expert_layer_period", default=2)
    e_offset = f.count("expert_layer_offset", default=1, least=0)
    norms = Params(vector=2 * f.count("hidden_size"))
    result = []
    for index in range(f.count("num_hidden_layers")):
        attention = gqa(f, index) if index % period == offset else mamba1(f)
        num = f.count("num_experts", default=16)
        if num > 1 and index % e_period == e_offset:
            router, expert, _, num, top_k = _moe(
                f, num, f.count("num_experts_per_tok"), f.count("intermediate_size")
            )
            result.append(Layer(attention, Params(), norms, router, expert, num, top_k))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
    return result


def _mamba2_only(f: Facts) -> list[Layer]:
    """Mamba-2: no attention at all; the state is all there is."""
    heads, width = f.count("num_heads"), f.count("expand", default=2) * f.count("hidden_size")
    mixer = mamba2(
        f,
        width=width,
        heads=heads,
        state=f.count("state_size"),
        groups=f.count("n_groups", default=1),
        kernel=f.count("conv_kernel", default=4),
        conv_bias=bool(f.get("use_conv_bias", default=True)),
        proj_bias=bool(f.get("use_bias", default=False)),
    )
    norm = Params(vector=f.count("hidden_size"))
    return [Layer(mixer, norms=norm)] * f.count("num_hidden_layers")


def _llama4(f: Facts) -> list[Layer]:
    """Llama 4: chunked attention, each n-th layer full; routed experts beside a shared one."""
    num_layers = f.count("num_hidden_layers")
    nope = f.get("no_rope_layers", default=None) or [
        int((i + 1) % f.count("no_rope_layer_interval", default=4) != 0) for i in range(num_layers)
    ]
    default = ["chunked_attention" if rope else "full_attention" for rope in nope]
    step = f.count("interleave_moe_layer_step", default=1)
    moe_layers = f.get("moe_layers", default=None) or range(step - 1, num_layers, step)
    bias = bool(f.get("attention_bias", default=False))
    norms = Params(vector=2 * f.count("hidden_size"))
    result = []
    for index, layer_type in enumerate(layer_types(f, tuple(WINDOWS), default)):
        attention = gqa(
            f,
            index,
            qkv_bias=bias,
            out_bias=bias,
            **windowed(f, layer_type, "attention_chunk_size"),
        )
        if index in moe_layers:
            width = f.count("intermediate_size")
            router, expert, shared, num, top_k = _moe(
                f,
                f.count("num_local_experts"),
                f.count("num_experts_per_tok"),
                width,
                shared=mlp_params(f, width),
            )
            result.append(Layer(attention, shared, norms, router, expert, num, top_k))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size_mlp")), norms))
    return result


def _deepseek(f: Facts) -> list[Layer]:
    """DeepSeek-V2, V3 and their like: MLA, dense first layers, then routed and shared experts."""
    attention = mla(f, indexer=f.model_type in ("deepseek_v32", "glm_moe_dsa"))
    norms = Params(vector=2 * f.count("hidden_size"))
    result = []
    for index in range(f.count("num_hidden_layers")):
        moe = _deepseek_moe(f, index)
        if moe:
            router, expert, shared, num_experts, top_k = moe
            result.append(Layer(attention, shared, norms, router, expert, num_experts, top_k))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
    return result


def _gemma4(f: Facts) -> list[Layer]:
    """Gemma 4: wider heads in full layers; the last layers share the KV of earlier ones."""
    num_layers, hidden = f.count("num_hidden_layers"), f.count("hidden_size")
    types = layer_types(
        f, ("full_attention", "sliding_attention"), _every("sliding_window_pattern", 6)(f)
    )
    types[-1] = "full_attention"
    num_shared = f.count("num_kv_shared_layers", default=0, least=0)
    per_layer_width = f.get("hidden_size_per_layer_input", default=256)
    global_dim = f.count("global_head_dim", default=512)
    k_eq_v = bool(f.get("attention_k_eq_v", default=False))
    global_kv = f.get("num_global_key_value_heads", default=None) if k_eq_v else None
    result = []
    for index, layer_type in enumerate(types):
        full = layer_type == "full_attention"
        shares = index >= num_layers - num_shared
        window = None if full else f.count("sliding_window")
        attention = gqa(
            f,
            index,
            qk_norm="head",
            window=window,
            kind=Kind.SHARED if shares else (Kind.FULL if full else Kind.SLIDING),
            head_dim=global_dim if full else None,
            kv_heads=global_kv if full else None,
            has_v=not (k_eq_v and full),
        )
        width = f.count("intermediate_size")
        if shares and f.get("use_double_wide_mlp", default=False):
            width *= 2
        norms = Params(vector=4 * hidden)
        if per_layer_width:
            norms += Params(2 * hidden * per_layer_width, hidden)
        if f.get("enable_moe_block", default=False):
            num = f.count("num_experts")
            router, expert, _, num, top_k = _moe(
                f, num, f.count("top_k_experts"), f.count("moe_intermediate_size")
            )
            router += Params(vector=hidden + num)
            norms += Params(vector=3 * hidden)
            result.append(Layer(attention, mlp_params(f, width), norms, router, expert, num, top_k))
        else:
            result.append(Layer(attention, mlp_params(f, width), norms))
    return result


def _nemotron_nas(f: Facts) -> list[Layer]:
    """Llama-Nemotron (Puzzle): each layer has its own KV heads and MLP width, or none at all."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    blocks = f.get("block_configs")
    if len(blocks) != f.count("num_hidden_layers"):
        raise PlanError(
            f"config lists {len(blocks)} block_configs for {f.count('num_hidden_layers')} layers"
        )
    result = []
    for index, block in enumerate(blocks):
        norms, attention, mlp = 0, Attention(Kind.NONE), Params()
        attn, ffn = block["attention"], block["ffn"]
        if attn.get("replace_with_linear"):
            attention = Attention(Kind.NONE, Params(hidden * hidden))
            norms += hidden
        elif not attn.get("no_op"):
            attention = gqa(f, index, kv_heads=heads // attn["n_heads_in_group"])
            norms += hidden
        if ffn.get("replace_with_linear"):
            mlp = Params(hidden * hidden)
            norms += hidden
        elif not ffn.get("no_op"):
            width = int(2 * ffn["ffn_mult"] * hidden / 3)
            mlp = mlp_params(f, -(-width // 256) * 256)
            norms += hidden
        result.append(Layer(attention, mlp, Params(vector=norms)))
    return result


Builder = Callable[[Facts], list[Layer]]

FAMILIES: dict[str, Builder] = {
    "llama": Llama().layers,
    "mistral": Llama(qkv_bias=False, out_bias=False, mlp_bias=False, window=_always_window).layers,
    "ministral": Llama(qkv_bias=False, out_bias=False, mlp_bias=False).layers,
    "qwen2": Llama(qkv_bias=True, out_bias=False, mlp_bias=False, window=_qwen_window).layers,
    "qwen3": Llama(qk_norm="head", mlp_bias=False, window=_qwen_window).layers,
    "phi3": Llama(qkv_bias=False, out_bias=False, mlp_bias=False, window=_always_window).layers,
    "granite": Llama().layers,
    "smollm3": Llama(window=_qwen_window).layers,
    "gemma": Llama(mlp_bias=False).layers,
    "gemma2": Llama(norms=4, mlp_bias=False, window=_alternating).layers,
    "gemma3_text": Llama(
        norms=4,
        qk_norm="head",
        mlp_bias=False,
        window=_every("sliding_window_pattern", 6),
    ).layers,
    "gemma4_text": _gemma4,
    "olmo2": Llama(qk_norm="all", mlp_bias=False).layers,
    "olmo3": Llama(
        qk_norm="all", mlp_bias=False, window=_every("sliding_window_pattern", 4)
    ).layers,
    "cohere2": Llama(norms=1, mlp_bias=False, window=_every("sliding_window_pattern", 4)).layers,
    "starcoder2": Llama(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        gated_mlp=False,
        layer_norm=True,
        window=_always_window,
    ).layers,
    "mixtral": Llama(
        qkv_bias=False, out_bias=False, moe=_mixtral_moe, window=_always_window
    ).layers,
    "granitemoe": Llama(moe=_mixtral_moe).layers,
    "qwen2_moe": Llama(
        qkv_bias=True, out_bias=False, moe=_qwen_moe, window=_qwen_window, mlp_bias=False
    ).layers,
    "qwen3_moe": Llama(qk_norm="head", moe=_qwen_moe, window=_qwen_window, mlp_bias=False).layers,
    "olmoe": Llama(qk_norm="all", moe=_olmoe_moe).layers,
    "gpt_oss": Llama(
        qkv_bias=True, out_bias=True, sinks=True, moe=_gpt_oss_moe, window=_alternating
    ).layers,
    "glm4_moe": Llama(out_bias=False, moe=_deepseek_moe, mlp_bias=False).layers,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "deepseek_v32": _deepseek,
    "kimi_k2": _deepseek,
    "llama4_text": _llama4,
    "qwen3_next": _qwen3_next,
    "qwen3_5_text": _qwen3_next,
    "qwen3_5_moe_text": _qwen3_next,
    "bamba": _bamba,
    "granitemoehybrid": _bamba,
    "jamba": _jamba,
    "mamba2": _mamba2_only,
    "nemotron-nas": _nemotron_nas,
}

# Types whose head is the embedding unless the config says otherwise.
_TIED = {"gemma", "gemma2", "gemma3_text", "gemma4_text", "cohere2", "starcoder2", "smollm3"}

# Configs that wrap a text model beside a vision or audio one.
_WRAPPERS = {
    "llama4": "llama4_text",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
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
        model_type = _WRAPPERS[model_type]
        config = {
            **{
                k: v
                for k, v in outer.items()
                if k in ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings")
            },
            **outer["text_config"],
        }
    build = FAMILIES.get(model_type)
    if build is None:
        known = sorted({*FAMILIES, *_WRAPPERS})
        near = difflib.get_close_matches(model_type, known, n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise PlanError(
            f"model type {model_type!r} is not known, so its KV and weights are not guessed{hint}; "
            f"known: {', '.join(known)}"
        )
    f = Facts(config, model_type)
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
    raise PlanError(f"quantisation {name} is not known; give --weights to say how it is stored")


def layer_summary(shape: ModelShape) -> str:
    """One line on the layers, for reports."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in shape.kinds().items())
    moe = len(shape.moe_layers)
    if not moe:
        return f"{len(shape.layers)} layers ({kinds})"
    experts = f"{moe} with {shape.num_experts} experts, top-{shape.top_k_experts}"
    return f"{len(shape.layers)} layers ({kinds}; {experts})"
