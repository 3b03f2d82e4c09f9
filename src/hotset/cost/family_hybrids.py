"""The layers of families that mix attention with layers of fixed state, from the facts of a config.

Counts follow the parameters that `transformers` creates for the text model.
"""

from hotset.cost.family_experts import mixtral_moe, moe, qwen_moe
from hotset.cost.mixers import (
    Facts,
    gated_delta_net,
    gqa,
    layer_types,
    mamba1,
    mamba2,
    mlp_params,
    short_conv,
)
from hotset.cost.params import Params
from hotset.cost.shape import Layer
from hotset.errors import PlanError

_TYPES = ("full_attention", "linear_attention")


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
        proj_bias=bool(f.get("mamba_proj_bias", default=False)),
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
            result.append(Layer(attention, mlp, norms))
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
    conv = short_conv(
        f,
        kernel=f.count("conv_L_cache", default=3),
        bias=bool(f.get("conv_bias", default=False)),
    )
    norms = Params(vector=2 * f.count("hidden_size"))
    return [
        Layer(conv if kind == "conv" else gqa(f, i, qk_norm="head"), mlp_params(f, width), norms)
        for i, kind in enumerate(layer_types(f, ("full_attention", "conv"), default))
    ]


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
        proj_bias=bool(f.get("use_bias", default=False)),
    )
    norm = Params(vector=f.count("hidden_size"))
    return [Layer(mixer, norms=norm)] * f.count("num_hidden_layers")
