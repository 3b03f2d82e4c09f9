"""The pieces of a layer, from the facts of a config: attention of each kind, and MLPs."""

import math
from collections.abc import Sequence
from typing import Any

from hotset.cost.attention import Attention, Indexer, Kind
from hotset.cost.cache_spec import KeysValues, Latent, Shared, State
from hotset.cost.params import WHOLE, Params, Shares
from hotset.errors import PlanError

Config = dict[str, Any]
_MISSING = object()


class Facts:
    """Reads a config, and says which field is missing or makes no sense."""

    def __init__(self, config: Config, model_type: str) -> None:
        self.config = config
        self.model_type = model_type

    def get(self, *names: str, default: Any = _MISSING) -> Any:
        """What `names` say, which is the same; without a default a missing one is refused."""
        given = {name: value for name in names if (value := self.config.get(name)) is not None}
        values = list(given.values())
        if any(value != values[0] for value in values):
            said = " and ".join(f"{name} {value!r}" for name, value in given.items())
            raise PlanError(f"config has {said}, which mean the same; expected one value")
        if values:
            return values[0]
        if default is not _MISSING:
            return default
        raise PlanError(f"config of model type {self.model_type!r} has no {' or '.join(names)}")

    def count(self, *names: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(
                f"config field {names[0]} is {value!r}; expected a whole number of {least} or more"
            )
        return value

    def per_layer(self, name: str, index: int, default: Any = _MISSING) -> int:
        """A count that is one number, or a list with one for each layer."""
        value = self.get(name, default=default)
        if isinstance(value, list):
            num_layers = self.count("num_hidden_layers")
            if len(value) != num_layers:
                raise PlanError(
                    f"config field {name} lists {len(value)} values for {num_layers} layers"
                )
            value = value[index]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise PlanError(f"config field {name} holds {value!r}; expected a whole number")
        return value


def gqa(
    f: Facts,
    index: int,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: str = "",
    gated: bool = False,
    sinks: bool = False,
    kind: Kind = Kind.FULL,
    window: int | None = None,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    has_v: bool = True,
) -> Attention:
    """Multi-head, grouped-query or multi-query attention, by the number of KV heads.

    `qk_norm` is "head" for a norm of one head's width, "all" for one over all heads, "" for none.
    `gated` doubles the query projection (an output gate).
    """
    hidden = f.count("hidden_size")
    heads = f.per_layer("num_attention_heads", index)
    kv = kv_heads or f.per_layer("num_key_value_heads", index, default=heads)
    if heads == 0 or kv == 0:
        return Attention(Kind.NONE)
    if heads % kv:
        raise PlanError(f"config has {heads} attention heads, which {kv} KV heads do not divide")
    if head_dim is None:
        if hidden % heads and f.get("head_dim", default=None) is None:
            raise PlanError(
                f"config has {heads} attention heads, which do not divide hidden_size {hidden}, "
                "and no head_dim"
            )
        head_dim = f.count("head_dim", default=hidden // heads)
    q_width, kv_width = heads * head_dim, kv * head_dim
    owns = kind is not Kind.SHARED
    cache = KeysValues(kv, head_dim, head_dim, window)
    projected = q_width * (1 + gated) + kv_width * (1 + has_v) * owns
    norms = {"head": head_dim * (1 + owns), "all": q_width + kv_width, "": 0}[qk_norm]
    matrix = hidden * projected + q_width * hidden
    vector = projected * qkv_bias + hidden * out_bias + norms + heads * sinks
    of_kv = kv_width * (1 + has_v) * owns
    shares = Shares(
        Params(vector=hidden * out_bias + norms), Params(hidden * of_kv, of_kv * qkv_bias), kv
    )
    return Attention(
        kind=kind,
        params=Params(matrix, vector),
        shares=WHOLE if qk_norm == "all" else shares,
        num_heads=heads,
        cache=cache if owns else Shared(cache),
        score_dim=head_dim,
        mix_dim=head_dim,
        window=window,
    )


def mla(f: Facts, *, indexer: Indexer | None = None) -> Attention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): the cache is the latent, once.

    With an indexer prompts attend as decodes do, to the latents that it selects.
    """
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    rank, rope = f.count("kv_lora_rank"), f.count("qk_rope_head_dim")
    nope = f.count("qk_nope_head_dim")
    default = {"default": hidden // heads} if f.model_type == "minicpm3" else {}
    v_dim = f.count("v_head_dim", **default)
    q_rank = f.get("q_lora_rank", default=None)
    matrix = hidden * (rank + rope) + rank * heads * (nope + v_dim) + heads * v_dim * hidden
    vector, whole = rank, hidden * (rank + rope)
    if q_rank is None:
        matrix += hidden * heads * (nope + rope)
    else:
        matrix += hidden * q_rank + q_rank * heads * (nope + rope)
        vector += q_rank
        whole += hidden * q_rank
    if f.get("attention_bias", default=False):
        vector += (rank + rope) + hidden + (q_rank or 0)
    if indexer and not indexer.is_shared:
        width, index_heads = indexer.key_dim, indexer.num_heads
        indexing = q_rank * index_heads * width + hidden * (width + index_heads)
        matrix, whole = matrix + indexing, whole + indexing
        vector += 2 * width
    return Attention(
        kind=Kind.MLA,
        params=Params(matrix, vector),
        shares=Shares(Params(whole, vector)),
        num_heads=heads,
        cache=Latent(rank, rope, KeysValues(heads, nope + rope, v_dim)),
        score_dim=rank + rope,
        mix_dim=rank,
        indexer=indexer,
    )


def mlp_whole(f: Facts, *, bias: bool) -> Params:
    """What of an MLP each rank has all of: the bias of its output."""
    return Params(vector=f.count("hidden_size") * bias)


def mlp_params(f: Facts, width: int, *, gated: bool = True, bias: bool = False) -> Params:
    """An MLP of that inner width: two matrices, three if gated."""
    hidden = f.count("hidden_size")
    matrices = 3 if gated else 2
    return Params(matrices * hidden * width, ((matrices - 1) * width + hidden) if bias else 0)


def layer_types(f: Facts, allowed: Sequence[str], default: list[str] | None = None) -> list[str]:
    """`layer_types` of the config, each of which must be in `allowed`."""
    num_layers = f.count("num_hidden_layers")
    types = f.get("layer_types", default=default)
    if types is None:
        types = ["full_attention"] * num_layers
    renamed = {"attention": "full_attention", "mamba": "linear_attention"}
    types = [renamed.get(t, t) for t in types]
    unknown = sorted({t for t in types if t not in allowed})
    if unknown:
        raise PlanError(
            f"attention type {unknown[0]!r} of model type {f.model_type!r} is not known; "
            f"known for it: {', '.join(allowed)}"
        )
    if len(types) != num_layers:
        raise PlanError(f"config lists {len(types)} layer_types for {num_layers} layers")
    return types


WINDOWS = {
    "full_attention": Kind.FULL,
    "sliding_attention": Kind.SLIDING,
    "chunked_attention": Kind.CHUNKED,
}


def windowed(f: Facts, layer_type: str, window_field: str = "sliding_window") -> dict[str, Any]:
    """`kind` and `window` of a layer, for `_gqa`."""
    kind = WINDOWS[layer_type]
    return {"kind": kind, "window": None if kind is Kind.FULL else f.count(window_field)}


def gated_delta_net(f: Facts) -> Attention:
    """Gated DeltaNet (Qwen3-Next): a state of value heads x key dim x value dim, and a conv."""
    hidden = f.count("hidden_size")
    k_heads, v_heads = f.count("linear_num_key_heads"), f.count("linear_num_value_heads")
    k_dim, v_dim = f.count("linear_key_head_dim"), f.count("linear_value_head_dim")
    kernel = f.count("linear_conv_kernel_dim")
    conv_width = 2 * k_heads * k_dim + v_heads * v_dim
    matrix = hidden * (conv_width + v_heads * v_dim) + hidden * 2 * v_heads
    matrix += v_heads * v_dim * hidden
    return Attention(
        Kind.RECURRENT,
        Params(matrix, conv_width * kernel + 2 * v_heads + v_dim),
        shares=Shares(Params(vector=v_dim), heads=k_heads),
        num_heads=v_heads,
        cache=State((v_heads, v_dim, k_dim), (conv_width, kernel - 1)),
    )


def kimi_delta(f: Facts) -> Attention:
    """Kimi Delta Attention (arXiv 2510.26692): a decay for each channel of a head's keys."""
    inner = f.get("linear_attn_config", default={})
    known = {"linear_num_heads": "num_heads", "linear_head_dim": "head_dim"}
    known["linear_conv_kernel_dim"] = "short_conv_kernel_size"
    given = {name: inner[other] for name, other in known.items() if other in inner}
    f = Facts({**f.config, **given}, f.model_type)
    hidden, heads = f.count("hidden_size"), f.count("linear_num_heads")
    dim, kernel = f.count("linear_head_dim"), f.count("linear_conv_kernel_dim")
    width = heads * dim
    # Queries, keys, values and output; the two gates, each through a head's width; and beta.
    matrix = 4 * hidden * width + 2 * (hidden * dim + dim * width) + hidden * heads
    return Attention(
        Kind.RECURRENT,
        Params(matrix, 3 * width * kernel + width + heads + dim),
        shares=WHOLE,
        num_heads=heads,
        cache=State((heads, dim, dim), (3 * width, kernel - 1)),
    )


def mamba2(
    f: Facts,
    *,
    width: int,
    heads: int,
    state: int,
    groups: int,
    kernel: int,
    conv_bias: bool,
    in_bias: bool,
    out_bias: bool,
    has_norm: bool = True,
    sums_squares: bool = True,
) -> Attention:
    """Mamba-2 mixer (Dao and Gu, 2024): a state of heads x head dim x state size."""
    hidden = f.count("hidden_size")
    if width % heads:
        raise PlanError(f"config has {heads} heads, which do not divide the width {width} of Mamba")
    conv_width = width + 2 * groups * state
    projected = width + conv_width + heads
    vector = conv_width * (kernel + conv_bias) + 3 * heads + width * has_norm
    vector += projected * in_bias + hidden * out_bias
    grouped = 2 * groups * state
    shares = Shares(
        Params(vector=hidden * out_bias),
        Params(hidden * grouped, grouped * (kernel + conv_bias + in_bias)),
        groups,
        # A norm is over the channels of a group; of one group ranks add up their squares.
        heads=math.gcd(heads, groups) if has_norm and (groups > 1 or not sums_squares) else heads,
    )
    return Attention(
        Kind.RECURRENT,
        Params(hidden * projected + width * hidden, vector),
        shares=shares,
        num_heads=heads,
        cache=State((heads, width // heads, state), (conv_width, kernel - 1)),
        grouped_channels=grouped,
    )


def short_conv(f: Facts) -> Attention:
    """Gated short convolution (LFM2): nothing but the last columns is kept."""
    hidden, kernel = f.count("hidden_size"), f.count("conv_L_cache", default=3)
    bias = hidden * bool(f.get("conv_bias", default=False))
    return Attention(
        Kind.RECURRENT,
        Params(4 * hidden * hidden, hidden * kernel + 5 * bias),
        shares=Shares(Params(vector=bias), heads=hidden),
        num_heads=1,
        cache=State((), (hidden, kernel - 1)),
    )


def mamba1(f: Facts) -> Attention:
    """Mamba mixer as in Jamba: a state of inner width x state size."""
    hidden, state = f.count("hidden_size"), f.count("mamba_d_state", default=16)
    kernel, rank = f.count("mamba_d_conv", default=4), f.get("mamba_dt_rank", default="auto")
    width = f.count("mamba_expand", default=2) * hidden
    if rank == "auto":
        rank = -(-hidden // 16)
    matrix = hidden * 2 * width + width * (rank + 2 * state) + rank * width + width * hidden
    vector = width * (kernel + bool(f.get("mamba_conv_bias", default=True)))
    vector += width + width * state + width + rank + 2 * state
    if f.get("mamba_proj_bias", default=False):
        vector += 2 * width + hidden
    return Attention(
        Kind.RECURRENT,
        Params(matrix, vector),
        shares=WHOLE,
        num_heads=1,
        cache=State((1, width, state), (width, kernel - 1)),
    )
