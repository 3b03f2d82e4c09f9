"""The layers of families that mix attention with layers of fixed state, from the facts of a config.

Counts follow the parameters that `transformers` creates for the text model.
"""

from collections.abc import Callable

from hotset.cost.attention import Attention, Kind
from hotset.cost.family_experts import is_dense, mixtral_moe, moe, plain_moe, qwen_moe
from hotset.cost.mixers import (
    Facts,
    gated_delta_net,
    gqa,
    kimi_delta,
    layer_types,
    mamba1,
    mamba2,
    mla,
    mlp_params,
    mlp_whole,
    short_conv,
)
from hotset.cost.params import Params
from hotset.cost.shape import Layer
from hotset.errors import PlanError

_TYPES = ("full_attention", "linear_attention")
_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
# What letters of Nemotron's patterns stand for.
_BLOCKS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def qwen3_next(f: Facts) -> list[Layer]:
    """Qwen3-Next and 3.5: three gated DeltaNet layers, then one of gated full attention."""
    interval = f.count("full_attention_interval", default=4)
    default = [
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(f.count("num_hidden_layers"))
    ]
    norms = Params(vector=2 * f.count("hidden_size"))
    result = []
    for index, layer_type in enumerate(layer_types(f, _TYPES, default)):
        if layer_type == "linear_attention":
            attention = gated_delta_net(f)
        else:
            bias = bool(f.get("attention_bias", default=False))
            attention = gqa(f, index, qk_norm="head", gated=True, qkv_bias=bias, out_bias=bias)
        has_experts = f.get("num_experts", "num_local_experts", default=0)
        moe = qwen_moe(f, index) if has_experts else None
        if moe:
            result.append(moe.layer(attention, norms))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
    return result


def bamba(f: Facts) -> list[Layer]:
    """Bamba and Granite 4 hybrids: Mamba-2 layers with a few of attention between."""
    num_experts = f.get("num_local_experts", default=0)
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
        in_bias=bool(f.get("mamba_proj_bias", default=False)),
        out_bias=bool(f.get("mamba_proj_bias", default=False)),
    )
    norms = Params(vector=2 * f.count("hidden_size"))
    bias = bool(f.get("attention_bias", default=False))
    result = []
    for index, layer_type in enumerate(layer_types(f, _TYPES, default)):
        attention = (
            gqa(f, index, qkv_bias=bias, out_bias=bias) if layer_type == "full_attention" else mamba
        )
        if f.model_type == "granitemoehybrid":
            shared = mlp_params(f, f.count("shared_intermediate_size"))
            if num_experts:
                experts = mixtral_moe(f, index)._replace(shared=shared)
                result.append(experts.layer(attention, norms))
            else:
                result.append(Layer(attention, shared, norms))
        else:
            mlp_bias = bool(f.get("mlp_bias", default=False))
            mlp = mlp_params(f, f.count("intermediate_size"), bias=mlp_bias)
            result.append(Layer(attention, mlp, norms, mlp_whole=mlp_whole(f, bias=mlp_bias)))
    return result


def jamba(f: Facts) -> list[Layer]:
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
            top_k, width = f.count("num_experts_per_tok"), f.count("intermediate_size")
            result.append(moe(f, num, top_k, width).layer(attention, norms))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
    return result


def lfm2(f: Facts) -> list[Layer]:
    """LFM2: short convolutions with a few layers of attention between."""
    num_layers = f.count("num_hidden_layers")
    attending = f.get("full_attn_idxs", default=range(num_layers))
    default = ["full_attention" if i in attending else "conv" for i in range(num_layers)]
    if not f.get("tie_embedding", default=True):
        raise PlanError("config has tie_embedding false; of lfm2 tied embeddings are known alone")
    width = f.get("block_ff_dim", default=None) or f.count("intermediate_size")
    if f.get("block_auto_adjust_ff_dim", default=True):
        width = int(2 * width / 3)
        if (factor := f.get("block_ffn_dim_multiplier", default=1.0)) is not None:
            multiple = f.count("block_multiple_of", default=256)
            width = -(-int(factor * width) // multiple) * multiple
    conv, norms = short_conv(f), Params(vector=2 * f.count("hidden_size"))
    return [
        Layer(conv if kind == "conv" else gqa(f, i, qk_norm="head"), mlp_params(f, width), norms)
        for i, kind in enumerate(layer_types(f, ("full_attention", "conv"), default))
    ]


def lfm2_moe(f: Facts) -> list[Layer]:
    """LFM2 with experts in all but the first layers."""
    if not f.get("tie_embedding", default=True):
        raise PlanError("config has tie_embedding false; of lfm2_moe tied embeddings are known")
    conv, norms = short_conv(f), Params(vector=2 * f.count("hidden_size"))
    num_dense = f.count("num_dense_layers", default=2, least=0)
    layers = []
    for index, kind in enumerate(layer_types(f, ("full_attention", "conv"))):
        attention = conv if kind == "conv" else gqa(f, index, qk_norm="head")
        if index < num_dense:
            layers.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
        else:
            num, top_k = f.count("num_experts"), f.count("num_experts_per_tok")
            experts = moe(f, num, top_k, f.count("moe_intermediate_size"))
            layers.append(experts.layer(attention, norms))
    return layers


def olmo_hybrid(f: Facts) -> list[Layer]:
    """OLMo Hybrid: three gated DeltaNet layers, then one of attention."""
    num_layers, heads = f.count("num_hidden_layers"), f.count("num_attention_heads")
    default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(num_layers)]
    if "full_attention" not in default:
        default[-1] = "full_attention"
    f = Facts({**dict.fromkeys(_HEADS, heads), **f.config}, f.model_type)
    key_dim = int(0.75 * f.count("hidden_size") / f.count("linear_num_key_heads"))
    key_dim = f.count("linear_key_head_dim", default=key_dim)
    sizes = {"linear_key_head_dim": key_dim, "linear_value_head_dim": 2 * key_dim}
    f = Facts({**sizes, "linear_conv_kernel_dim": 4, **f.config}, f.model_type)
    bias = bool(f.get("attention_bias", default=False))
    norms = Params(vector=2 * f.count("hidden_size"))
    mlp = mlp_params(f, f.count("intermediate_size"))
    return [
        Layer(
            gated_delta_net(f)
            if kind == "linear_attention"
            else gqa(f, index, qk_norm="all", qkv_bias=bias, out_bias=bias),
            mlp,
            norms,
        )
        for index, kind in enumerate(layer_types(f, _TYPES, default))
    ]


def falcon_h1(f: Facts) -> list[Layer]:
    """Falcon-H1: each layer attends and keeps a state, side by side; here it is two."""
    width = f.get("mamba_d_ssm", default=None)
    mamba = mamba2(
        f,
        width=width or f.count("mamba_expand", default=2) * f.count("hidden_size"),
        heads=f.count("mamba_n_heads", default=128),
        state=f.count("mamba_d_state", default=256),
        groups=f.count("mamba_n_groups", default=1),
        kernel=f.count("mamba_d_conv", default=4),
        conv_bias=bool(f.get("mamba_conv_bias", default=True)),
        in_bias=bool(f.get("mamba_proj_bias", default=False)),
        out_bias=bool(f.get("projectors_bias", default=False)),
        has_norm=bool(f.get("mamba_rms_norm", default=False)),
        sums_squares=False,
    )
    bias = bool(f.get("attention_bias", default=False))
    norm = Params(vector=f.count("hidden_size"))
    mlp_bias = bool(f.get("mlp_bias", default=False))
    mlp = mlp_params(f, f.count("intermediate_size"), bias=mlp_bias)
    layers: list[Layer] = []
    for index in range(f.count("num_hidden_layers")):
        attention = gqa(f, index, qkv_bias=bias, out_bias=bias)
        whole = mlp_whole(f, bias=mlp_bias)
        layers += [Layer(mamba, norms=norm), Layer(attention, mlp, norm, mlp_whole=whole)]
    return layers


def nemotron_h(f: Facts) -> list[Layer]:
    """Nemotron-H and Nemotron 3: each layer is a mixer, attention, an MLP or experts alone."""
    heads = f.count("mamba_num_heads")
    proj_bias = bool(f.get("use_bias", default=False))
    mamba = mamba2(
        f,
        width=heads * f.count("mamba_head_dim"),
        heads=heads,
        state=f.count("ssm_state_size"),
        groups=f.count("n_groups", "mamba_n_groups", default=8),
        kernel=f.count("conv_kernel", "mamba_d_conv", default=4),
        conv_bias=bool(f.get("use_conv_bias", "mamba_conv_bias", default=True)),
        in_bias=proj_bias,
        out_bias=proj_bias,
    )
    norm, none = Params(vector=f.count("hidden_size")), Attention(Kind.NONE)
    mlp_bias = bool(f.get("mlp_bias", default=False))
    makes: dict[str, Callable[[int], Layer]] = {
        "linear_attention": lambda index: Layer(mamba, norms=norm),
        "full_attention": lambda index: Layer(gqa(f, index), norms=norm),
        "mlp": lambda index: Layer(
            none,
            mlp_params(f, f.count("intermediate_size"), gated=False, bias=mlp_bias),
            norm,
            mlp_whole=mlp_whole(f, bias=mlp_bias),
        ),
        "moe": lambda index: plain_moe(f, bias=mlp_bias).layer(none, norm),
    }
    types = f.get("layer_types", "layers_block_type", default=None)
    if types is None:
        pattern = f.get("hybrid_override_pattern", default="ME*-")
        types = [_BLOCKS.get(letter, letter) for letter in pattern]
    # Transformers goes by the list, whatever the number of layers says.
    f = Facts({**f.config, "layer_types": types, "num_hidden_layers": len(types)}, f.model_type)
    kinds = layer_types(f, tuple(makes))
    return [makes[kind](index) for index, kind in enumerate(kinds)]


def kimi_linear(f: Facts) -> list[Layer]:
    """Kimi Linear: three layers of Kimi Delta Attention, then one that caches latents."""
    num_layers, norms = f.count("num_hidden_layers"), Params(vector=2 * f.count("hidden_size"))
    attending = f.get("linear_attn_config", default={}).get("full_attn_layers")
    if attending is None:
        attending = range(5, num_layers + 1, 4)
    default = [  # counted from 1
        "full_attention" if index + 1 in attending else "linear_attention"
        for index in range(num_layers)
    ]
    width = f.count("moe_intermediate_size")
    num_shared = f.count("n_shared_experts", "num_shared_experts", default=1, least=0)
    experts = moe(
        f,
        f.count("num_experts", "num_local_experts"),
        f.count("num_experts_per_tok", "num_experts_per_token"),
        width,
        shared=mlp_params(f, num_shared * width),
    )
    layers = []
    for index, kind in enumerate(layer_types(f, _TYPES, default)):
        attention = kimi_delta(f) if kind == "linear_attention" else mla(f)
        if is_dense(f, index):
            layers.append(Layer(attention, mlp_params(f, f.count("intermediate_size")), norms))
        else:
            layers.append(experts.layer(attention, norms))
    return layers


def mamba2_only(f: Facts) -> list[Layer]:
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
        in_bias=bool(f.get("use_bias", default=False)),
        out_bias=bool(f.get("use_bias", default=False)),
    )
    norm = Params(vector=f.count("hidden_size"))
    return [Layer(mixer, norms=norm)] * f.count("num_hidden_layers")
