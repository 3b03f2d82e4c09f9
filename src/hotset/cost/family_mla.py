"""The layers of families with latent attention (MLA), from the facts of a config.

Counts follow the parameters that `transformers` creates for the text model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hotset.cost.attention import Attention, Indexer
from hotset.cost.family_experts import deepseek_bias, deepseek_moe, moe
from hotset.cost.mixers import Facts, mla, mlp_params, mlp_whole
from hotset.cost.params import Params
from hotset.cost.shape import Layer
from hotset.errors import PlanError


def full_indexers(f: Facts) -> list[str]:
    """DeepSeek-V3.2: each layer selects for itself."""
    return ["full"] * f.count("num_hidden_layers")


def glm_indexers(f: Facts) -> list[str]:
    """GLM-5: `indexer_types`, a pattern, or every n-th layer."""
    pattern = f.get("index_topk_pattern", default=None)
    if (pattern := f.get("indexer_types", default=pattern)) is not None:
        return [{"F": "full", "S": "shared"}.get(kind, kind) for kind in pattern]
    every_n = max(f.count("index_topk_freq", default=1, least=0), 1)
    first = f.count("index_skip_topk_offset", default=2, least=0) - 1
    layers = range(f.count("num_hidden_layers"))
    return ["shared" if max(index - first, 0) % every_n else "full" for index in layers]


def hy_indexers(f: Facts) -> list[str]:
    """Hunyuan 4: `indexer_types`, or the first layer and every fourth from the second on."""
    types = f.get("indexer_types", default=None)
    if types is not None:
        return list(types)
    layers = range(f.count("num_hidden_layers"))
    return ["shared" if index and (index - 1) % 4 else "full" for index in layers]


@dataclass(frozen=True, slots=True)
class Mla:
    """Families that differ from DeepSeek-V3 in what stands around latent attention.

    Attributes:
        has_experts: in layers that are not dense.
        indexers: `full` or `shared` for each layer; None where layers attend to all tokens.
        moe_norm: a norm behind the experts.
        gated: an output gate and a sink per head.
        hyper: several residual streams, joined before and split behind each part of a layer.
    """

    has_experts: bool = True
    indexers: Callable[[Facts], list[str]] | None = None
    moe_norm: bool = False
    gated: bool = False
    hyper: bool = False

    def __call__(self, f: Facts) -> list[Layer]:
        """All layers of the model."""
        hidden = f.count("hidden_size")
        norms = Params(vector=2 * hidden)
        if self.hyper:
            norms += _hyper_connection(f, 2) * 2
        result = []
        for index, indexer in enumerate(self._indexers(f)):
            attention = self._attention(f, indexer)
            experts = deepseek_moe(f, index) if self.has_experts else None
            if experts:
                behind = Params(vector=hidden if self.moe_norm else 0)
                result.append(experts.layer(attention, norms + behind))
            else:
                bias = deepseek_bias(f)
                mlp = mlp_params(f, f.count("intermediate_size"), bias=bias)
                result.append(Layer(attention, mlp, norms, mlp_whole=mlp_whole(f, bias=bias)))
        return result

    def _attention(self, f: Facts, indexer: Indexer | None) -> Attention:
        attention = mla(f, indexer=indexer)
        if not self.gated:
            return attention
        heads, width = f.count("num_attention_heads"), f.count("v_head_dim")
        gate = Params(f.count("hidden_size") * heads * width, heads)
        return replace(attention, params=attention.params + gate)

    def _indexers(self, f: Facts) -> list[Indexer | None]:
        num_layers = f.count("num_hidden_layers")
        if self.indexers is None:
            return [None] * num_layers
        types = self.indexers(f)
        full = Indexer(f.count("index_topk"), f.count("index_n_heads"), f.count("index_head_dim"))
        by_type = {"full": full, "shared": replace(full, is_shared=True)}
        if len(types) != num_layers or not set(types) <= set(by_type) or types[0] != "full":
            raise PlanError(
                f"config field indexer_types is {types}; expected full or shared for each of "
                f"{num_layers} layers, the first full"
            )
        return [by_type[kind] for kind in types]


def _hyper_connection(f: Facts, outputs: int) -> Params:
    """Of Hunyuan 4: weights, a base and a scale of `outputs` sets, from all streams."""
    streams = f.count("hc_mult", default=4)
    rows = outputs * streams
    return Params(rows * streams * f.count("hidden_size"), rows + outputs)


def longcat(f: Facts) -> list[Layer]:
    """LongCat-Flash: two layers of attention and dense MLP, with experts beside the first MLP.

    A token's picks go to experts that compute and to `zero_expert_num` that return their input; it
    reaches the share of the former. What transformers holds for the latter is never read, is in no
    checkpoint, and is not counted.
    """
    norms = Params(vector=2 * f.count("hidden_size"))
    num, idle = f.count("n_routed_experts"), f.count("zero_expert_num", least=0)
    picks = f.count("moe_topk", "num_experts_per_tok")
    width = f.count("expert_ffn_hidden_size", "moe_intermediate_size")
    experts = moe(f, num, max(1, round(picks * num / (num + idle))), width)
    mlp = mlp_params(f, f.count("ffn_hidden_size", "intermediate_size"))
    experts = experts._replace(router=experts.router + Params(f.count("hidden_size") * idle))
    attention = mla(f)
    both = [experts._replace(shared=mlp).layer(attention, norms), Layer(attention, mlp, norms)]
    return both * f.count("num_layers")


def hy_beside(f: Facts, num_layers: int) -> tuple[Params, Params]:
    """What joins the streams of Hunyuan 4 at the end."""
    return Params(), _hyper_connection(f, 1)
