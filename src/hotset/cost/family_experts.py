"""The experts of a layer in each family of models, from the facts of a config."""

from typing import NamedTuple

from hotset.cost.attention import Attention
from hotset.cost.mixers import Facts, mlp_params, mlp_whole
from hotset.cost.params import Params
from hotset.cost.shape import Layer
from hotset.errors import PlanError

# In transformers; others ignore the field.
_OBEYS_MLP_LAYER_TYPES = {"deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "hy_v4", "axk1"}
_OBEYS_MLP_LAYER_TYPES |= {"kimi_linear"}

# In transformers, whatever first_k_dense_replace says.
_FIRST_IS_DENSE = {"glm4_moe_lite", "hy_v4"}


class Moe(NamedTuple):
    """The experts of a layer; see `Layer`."""

    router: Params
    expert: Params
    num_experts: int
    top_k: int
    width: int
    shared: Params = Params()
    shared_whole: Params = Params()  # see `Layer.mlp_whole`
    expert_whole: Params = Params()

    def layer(self, attention: Attention, norms: Params) -> Layer:
        """A layer with these experts."""
        return Layer(
            attention,
            self.shared,
            norms,
            self.router,
            self.expert,
            self.num_experts,
            self.top_k,
            self.width,
            self.shared_whole,
            self.expert_whole,
        )


def moe(f: Facts, num: int, top_k: int, width: int, *, shared: Params | None = None) -> Moe:
    """Experts of that inner width."""
    if top_k > num:
        raise PlanError(f"config routes each token to {top_k} of {num} experts")
    router = Params(f.count("hidden_size") * num)
    return Moe(router, mlp_params(f, width), num, top_k, width, shared or Params())


def mixtral_moe(f: Facts, index: int) -> Moe:
    """Mixtral and GraniteMoe: experts in every layer."""
    return moe(
        f,
        f.count("num_local_experts"),
        f.count("num_experts_per_tok"),
        f.count("intermediate_size"),
    )


def olmoe_moe(f: Facts, index: int) -> Moe:
    """OLMoE: experts in every layer."""
    return moe(
        f, f.count("num_experts"), f.count("num_experts_per_tok"), f.count("intermediate_size")
    )


def qwen_moe(f: Facts, index: int) -> Moe | None:
    """Qwen MoE: a dense MLP where `mlp_only_layers` or the sparse step says so."""
    step = f.count("decoder_sparse_step", default=1)
    if index in f.get("mlp_only_layers", default=[]) or (index + 1) % step:
        return None
    shared_width = f.get("shared_expert_intermediate_size", default=0)
    shared = gate = Params()
    if shared_width:
        gate = Params(f.count("hidden_size"))
        shared = mlp_params(f, shared_width) + gate
    found = moe(
        f,
        f.count("num_experts", "num_local_experts"),  # the hub's files, and transformers' own dict
        f.count("num_experts_per_tok"),
        f.count("moe_intermediate_size"),
        shared=shared,
    )
    return found._replace(shared_whole=gate)


def deepseek_moe(f: Facts, index: int) -> Moe | None:
    """DeepSeek and GLM: dense first layers, then routed and shared experts."""
    if is_dense(f, index):
        return None
    width = f.count("moe_intermediate_size")
    shared_width = width * f.count("n_shared_experts", default=0, least=0)
    shared = mlp_params(f, shared_width, bias=deepseek_bias(f)) if shared_width else Params()
    num, top_k = f.count("n_routed_experts"), f.count("num_experts_per_tok")
    whole = mlp_whole(f, bias=bool(shared_width) and deepseek_bias(f))
    return moe(f, num, top_k, width, shared=shared)._replace(shared_whole=whole)


def is_dense(f: Facts, index: int) -> bool:
    """Whether a layer of DeepSeek, GLM or Kimi has an MLP in place of experts."""
    types = f.get("mlp_layer_types", default=None)
    if types is not None and f.model_type in _OBEYS_MLP_LAYER_TYPES:
        num_layers = f.count("num_hidden_layers")
        if len(types) != num_layers or not set(types) <= {"dense", "sparse"}:
            raise PlanError(
                f"config field mlp_layer_types is {types}; expected dense or sparse for each of "
                f"{num_layers} layers"
            )
        return bool(types[index] == "dense")
    first = 1
    if f.model_type not in _FIRST_IS_DENSE:
        first = f.count("first_k_dense_replace", default=0, least=0)
    return index < first or bool(index % f.count("moe_layer_freq", default=1))


def deepseek_bias(f: Facts) -> bool:
    """Of dense and shared MLPs, where transformers heeds the field."""
    return f.model_type in ("deepseek_v2", "minicpm3") and bool(f.get("mlp_bias", default=False))


def plain_moe(f: Facts, *, bias: bool) -> Moe:
    """Nemotron: experts of two matrices, of a latent of the hidden state where the config says."""
    hidden, latent = f.count("hidden_size"), f.get("moe_latent_size", default=None)
    num, top_k = f.count("n_routed_experts", "num_local_experts"), f.count("num_experts_per_tok")
    width = f.count("moe_intermediate_size")
    shared_width = f.count("moe_shared_expert_intermediate_size")
    shared = mlp_params(f, shared_width, gated=False, bias=bias)
    whole = mlp_whole(f, bias=bias)
    if latent is not None:
        projections = Params(2 * hidden * latent, (hidden + latent) * bias)
        shared, whole = shared + projections, whole + projections
    found = moe(f, num, top_k, width, shared=shared)
    expert = Params(2 * (latent or hidden) * width)
    return found._replace(expert=expert, shared_whole=whole)


def gpt_oss_moe(f: Facts, index: int) -> Moe:
    """gpt-oss: router and experts have biases."""
    hidden, width = f.count("hidden_size"), f.count("intermediate_size")
    num = f.count("num_local_experts", "num_experts")
    plain = moe(f, num, f.count("num_experts_per_tok", "experts_per_token"), width)
    return plain._replace(
        router=plain.router + Params(vector=num),
        expert=plain.expert + Params(vector=2 * width + hidden),
        expert_whole=Params(vector=hidden),
    )
