"""The layers of each family of models, from the facts of a config.

Counts follow the parameters that `transformers` creates for the text model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hotset.cost.attention import Attention, Kind
from hotset.cost.family_experts import Moe, mixtral_moe, moe
from hotset.cost.mixers import (
    WINDOWS,
    Facts,
    gqa,
    layer_types,
    mlp_params,
    mlp_whole,
    windowed,
)
from hotset.cost.params import Params
from hotset.cost.shape import Layer
from hotset.errors import PlanError

# A constant, or a field of the config, which is off or has the value beside it where it is missing.
Flag = bool | str | tuple[str, bool]


@dataclass(frozen=True, slots=True)
class Llama:
    """Families that differ from Llama in biases, norms and windows only."""

    qkv_bias: Flag = "attention_bias"
    out_bias: Flag = "attention_bias"
    qk_norm: str = ""
    qk_norm_if: str = ""  # a field without which there is no norm of one head's width
    norms: int = 2  # of the hidden width, a layer
    gated_mlp: bool = True
    mlp_bias: Flag = "mlp_bias"
    layer_norm: bool = False  # norms with a bias
    moe: Callable[[Facts, int], Moe | None] | None = None
    window: Callable[[Facts], list[str]] | None = None
    sinks: bool = False

    def __call__(self, f: Facts) -> list[Layer]:
        """All layers of the model."""

        def flag(value: Flag) -> bool:
            if isinstance(value, bool):
                return value
            name, default = (value, False) if isinstance(value, str) else value
            return bool(f.get(name, default=default))

        qk_norm = self.qk_norm
        if self.qk_norm_if and flag(self.qk_norm_if):
            qk_norm = "head"
        types = layer_types(f, tuple(WINDOWS), self.window(f) if self.window else None)
        norms = Params(vector=self.norms * f.count("hidden_size") * (2 if self.layer_norm else 1))
        result = []
        for index, layer_type in enumerate(types):
            attention = gqa(
                f,
                index,
                qkv_bias=flag(self.qkv_bias),
                out_bias=flag(self.out_bias),
                qk_norm=qk_norm,
                sinks=self.sinks,
                **windowed(f, layer_type),
            )
            moe = self.moe(f, index) if self.moe else None
            if moe:
                result.append(moe.layer(attention, norms))
            else:
                width, bias = f.per_layer("intermediate_size", index), flag(self.mlp_bias)
                mlp = mlp_params(f, width, gated=self.gated_mlp, bias=bias)
                result.append(Layer(attention, mlp, norms, mlp_whole=mlp_whole(f, bias=bias)))
        return result


def always_window(f: Facts) -> list[str]:
    """Mistral: one window for all layers, or none."""
    windowed = f.get("sliding_window", default=None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * f.count("num_hidden_layers")


def qwen_window(f: Facts) -> list[str]:
    """Qwen: full attention up to `max_window_layers`, a window from there on, if switched on."""
    num_layers = f.count("num_hidden_layers")
    if not f.get("use_sliding_window", default=False):
        return ["full_attention"] * num_layers
    first = f.count("max_window_layers", default=num_layers, least=0)
    return ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]


def every(pattern_field: str, default: int) -> Callable[[Facts], list[str]]:
    """Each n-th layer full, the others with a window."""

    def types(f: Facts) -> list[str]:
        n = f.count(pattern_field, default=default)
        return [
            "sliding_attention" if (i + 1) % n else "full_attention"
            for i in range(f.count("num_hidden_layers"))
        ]

    return types


def alternating(f: Facts) -> list[str]:
    """gpt-oss and Gemma 2: window, full, window, full."""
    return [
        "full_attention" if i % 2 else "sliding_attention"
        for i in range(f.count("num_hidden_layers"))
    ]


def llama4(f: Facts) -> list[Layer]:
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
            experts = mixtral_moe(f, index)
            shared = mlp_params(f, f.count("intermediate_size"))
            result.append(experts._replace(shared=shared).layer(attention, norms))
        else:
            result.append(Layer(attention, mlp_params(f, f.count("intermediate_size_mlp")), norms))
    return result


def _gemma4_heads(f: Facts, types: list[str]) -> list[tuple[int, int]]:
    """Width and number of KV heads of each layer.

    They stand in `per_layer_config`, or in the fields for full layers that the hub's files have,
    which transformers heeds only without that.
    """
    head_dim, kv_heads = f.count("head_dim", default=256), f.count("num_key_value_heads")
    overrides = f.get("per_layer_config", default=None)
    if overrides is None:
        full_dim, full_kv = f.count("global_head_dim", default=512), kv_heads
        if f.get("attention_k_eq_v", default=False):
            full_kv = f.count("num_global_key_value_heads", default=kv_heads)
        by_type = {"full_attention": (full_dim, full_kv), "sliding_attention": (head_dim, kv_heads)}
        return [by_type[layer_type] for layer_type in types]
    heads = [(head_dim, kv_heads)] * len(types)
    for index, override in overrides.items():
        layer = Facts({"head_dim": head_dim, "num_key_value_heads": kv_heads, **override}, "layer")
        if unknown := sorted(set(override) - {"head_dim", "num_key_value_heads"}):
            raise PlanError(
                f"per_layer_config of {f.model_type} has {unknown[0]}; known: head_dim, "
                "num_key_value_heads"
            )
        if not str(index).isdecimal() or int(index) >= len(types):
            raise PlanError(f"per_layer_config names layer {index!r} of {len(types)} layers")
        heads[int(index)] = layer.count("head_dim"), layer.count("num_key_value_heads")
    return heads


def gemma4(f: Facts) -> list[Layer]:
    """Gemma 4: wider heads in full layers; the last layers share the KV of earlier ones."""
    num_layers, hidden = f.count("num_hidden_layers"), f.count("hidden_size")
    types = layer_types(
        f, ("full_attention", "sliding_attention"), every("sliding_window_pattern", 6)(f)
    )
    types[-1] = "full_attention"
    num_shared = f.count("num_kv_shared_layers", default=0, least=0)
    per_layer_width = f.get("hidden_size_per_layer_input", default=256)
    heads = _gemma4_heads(f, types)
    k_eq_v = bool(f.get("attention_k_eq_v", default=False))
    bias = bool(f.get("attention_bias", default=False))
    result = []
    for index, layer_type in enumerate(types):
        full = layer_type == "full_attention"
        shares = index >= num_layers - num_shared
        window = None if full else f.count("sliding_window")
        attention = gqa(
            f,
            index,
            qk_norm="head",
            qkv_bias=bias,
            out_bias=bias,
            window=window,
            kind=Kind.SHARED if shares else (Kind.FULL if full else Kind.SLIDING),
            head_dim=heads[index][0],
            kv_heads=heads[index][1],
            has_v=not (k_eq_v and full),
        )
        width = f.count("intermediate_size")
        if shares and f.get("use_double_wide_mlp", default=False):
            width *= 2
        norms = Params(vector=4 * hidden)
        if per_layer_width:
            norms += Params(2 * hidden * per_layer_width, hidden)
        if f.get("enable_moe_block", default=False):
            num, top_k = f.count("num_experts"), f.count("top_k_experts")
            experts = moe(f, num, top_k, f.count("moe_intermediate_size"))
            experts = experts._replace(
                router=experts.router + Params(vector=hidden + num), shared=mlp_params(f, width)
            )
            result.append(experts.layer(attention, norms + Params(vector=3 * hidden)))
        else:
            result.append(Layer(attention, mlp_params(f, width), norms))
    return result


def nemotron_nas(f: Facts) -> list[Layer]:
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


def gemma4_beside(f: Facts, num_layers: int) -> tuple[Params, Params]:
    """Gemma 4: embeddings for each layer, and what projects them."""
    per_layer = f.get("hidden_size_per_layer_input", default=256)
    if not per_layer:
        return Params(), Params()
    vocab = f.count("vocab_size_per_layer_input", default=262_144)
    width = num_layers * per_layer
    return Params(vocab * width), Params(f.count("hidden_size") * width, per_layer)


def starcoder2_beside(f: Facts, num_layers: int) -> tuple[Params, Params]:
    """Starcoder 2: a bias of the last norm."""
    return Params(), Params(vector=f.count("hidden_size"))
