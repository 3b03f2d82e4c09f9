"""What a model weighs: parameters and KV bytes, exactly, from the facts of its config.json.

`families.py` builds a `ModelShape` from a config; here are the layer, the model and their bytes.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

from hotset.cost.attention import Attention, Kind
from hotset.cost.params import WEIGHT_BITS, Params, Shares
from hotset.errors import PlanError


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    Attributes:
        attention: its attention.
        mlp: the dense MLP, or the shared expert of an MoE layer.
        norms: everything else that is small: norms, gates, scalars.
        router: of an MoE layer.
        expert: one routed expert of it.
        num_experts: routed experts, 0 for a dense layer.
        top_k_experts: that a token uses.
        expert_width: of a routed expert's middle.
        mlp_whole: of `mlp`, what each tensor-parallel rank has all of.
        expert_whole: of `expert`, likewise.
    """

    attention: Attention
    mlp: Params = field(default_factory=Params)
    norms: Params = field(default_factory=Params)
    router: Params = field(default_factory=Params)
    expert: Params = field(default_factory=Params)
    num_experts: int = 0
    top_k_experts: int = 0
    expert_width: int = 0
    mlp_whole: Params = field(default_factory=Params)
    expert_whole: Params = field(default_factory=Params)

    @property
    def dense(self) -> Params:
        """All that every token reads."""
        return self.attention.params + self.mlp + self.norms + self.router

    @property
    def num_kernels(self) -> int:
        """Kernels one decode step launches for this layer in a fused engine, collectives apart.

        Counted over the operations of a layer: norm, QKV, rotary and cache write, attention,
        output, norm, gate and up, activation, down are 9; MLA needs 5 more (two down-projections
        and their norm, absorption before and after), a routed MLP 7 more than a dense one (router,
        top-k, sort, two quantise or gather steps, combine, scale) and a shared expert 3. A sparse
        layer launches 10 more (three projections, a norm and two rotaries, storing, scoring and
        selecting, the list of rows), and one where it takes the selection of another.
        """
        kernels = 2  # the norms
        kernels += {Kind.NONE: 0, Kind.MLA: 9, Kind.RECURRENT: 6}.get(self.attention.kind, 4)
        if self.attention.indexer:
            kernels += 1 if self.attention.indexer.is_shared else 10
        if self.num_experts:
            kernels += 10 + (3 if self.mlp.count else 0)
        elif self.mlp.count:
            kernels += 3
        return kernels


@dataclass(frozen=True)
class ModelShape:
    """A model as bytes: what its weights and its users' KV take.

    Attributes:
        name: as the user called it.
        model_type: of the config.
        hidden_size: width of the residual stream.
        vocab_size: of the head.
        layers: in order.
        embedding: input embeddings; held, but one row a token is read.
        head: output projection; empty when tied to the embedding, which is then read instead.
        other: final norm and the like.
        plain_dtype: of what is not quantised, and of everything in an unquantised checkpoint.
        index_dtype: key of `KV_BYTES`, of an indexer's keys; "auto" is `plain_dtype`.
        quantised: dtype by part (`attention`, `mlp`, `expert`) as the checkpoint stores it.
        expert_groups: routing groups and how many of them a token may use, where limited.
        max_context: longest context the config allows, None where it does not say.
        source: where the config came from.
    """

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    embedding: Params
    head: Params
    other: Params
    plain_dtype: str = "bf16"
    index_dtype: str = "auto"
    quantised: dict[str, str] = field(default_factory=dict)
    expert_groups: tuple[int, int] | None = None
    max_context: int | None = None
    source: str = ""

    def with_weights(self, dtype: str) -> "ModelShape":
        """The same model with the matrices of attention, MLP and experts stored as `dtype`.

        Embeddings, head, router, norms and biases stay 16-bit, as quantised checkpoints keep them.
        A 16- or 32-bit `dtype` is that of everything.
        """
        if dtype not in WEIGHT_BITS:
            raise PlanError(
                f"weights dtype {dtype!r} is unknown; use one of {', '.join(WEIGHT_BITS)}"
            )
        wide = WEIGHT_BITS[dtype] >= 16
        plain = dtype if wide else ("fp16" if self.plain_dtype == "fp16" else "bf16")
        parts = {} if wide else dict.fromkeys(("attention", "mlp", "expert"), dtype)
        return replace(self, plain_dtype=plain, quantised=parts)

    @property
    def stored(self) -> "ModelShape":
        """The same model with what this engine keeps of each token: see `CacheSpec`."""
        layers = (replace(layer, attention=layer.attention.stored) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    # -- parameters ---------------------------------------------------------------------------

    @cached_property
    def total_params(self) -> int:
        """All parameters; a tied head counts once."""
        return self.dense_params + self.expert_params

    @cached_property
    def dense_params(self) -> int:
        """All but the routed experts."""
        own = self.embedding + self.head + self.other
        return own.count + sum(layer.dense.count for layer in self.layers)

    @cached_property
    def expert_params(self) -> int:
        """Routed experts of all layers."""
        return sum(layer.expert.count * layer.num_experts for layer in self.layers)

    @cached_property
    def active_params(self) -> int:
        """Parameters one token uses: all dense ones and its top-k experts of each layer."""
        routed = sum(layer.expert.count * layer.top_k_experts for layer in self.layers)
        return self.dense_params + routed

    @cached_property
    def matmul_params(self) -> int:
        """Active parameters a token is multiplied with, two operations each.

        Of the two vocabulary matrices that is the head only: embeddings are looked up.
        """
        return self.active_params - (self.embedding.count if self.head.count else 0)

    # -- weight bytes -------------------------------------------------------------------------

    def part_bytes(self, part: str, params: Params) -> int:
        """Bytes of `params` as `part` (`attention`, `mlp`, `expert`, else plain) is stored."""
        return params.bytes(self.quantised.get(part, self.plain_dtype), self.plain_dtype)

    def layer_dense_bytes(self, layer: Layer, *, tp: int = 1) -> int:
        """Bytes of a layer without its routed experts, on each of `tp` ranks."""
        attention, mlp = layer.attention, Shares(layer.mlp_whole)
        return (
            self.part_bytes("attention", attention.shares.on_rank(attention.params, tp))
            + self.part_bytes("mlp", mlp.on_rank(layer.mlp, tp))
            + self.part_bytes("plain", layer.norms + layer.router)
        )

    def layer_expert_bytes(self, layer: Layer, *, es: int = 1) -> int:
        """Bytes of one routed expert of a layer, or of a slice on each of `es` ranks."""
        return self.part_bytes("expert", Shares(layer.expert_whole).on_rank(layer.expert, es))

    @cached_property
    def embedding_bytes(self) -> int:
        """Bytes of the input embeddings."""
        return self.part_bytes("plain", self.embedding)

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of everything but the routed experts."""
        own = self.part_bytes("plain", self.embedding + self.head + self.other)
        return own + sum(self.layer_dense_bytes(layer) for layer in self.layers)

    @cached_property
    def experts_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(self.layer_expert_bytes(layer) * layer.num_experts for layer in self.layers)

    @cached_property
    def expert_bytes_each(self) -> int:
        """Bytes of one routed expert of one layer (the largest where they differ); 0 if none."""
        return max((self.layer_expert_bytes(layer) for layer in self.layers), default=0)

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all weights, once."""
        return self.dense_bytes + self.experts_bytes

    def rank_dense_bytes(self, tp: int) -> int:
        """Bytes of everything but routed experts and input embeddings on each of `tp` ranks."""
        rows = -(-self.vocab_size // tp) if self.head.count else 0
        own = self.other + Params(rows * self.hidden_size)
        layers = sum(self.layer_dense_bytes(layer, tp=tp) for layer in self.layers)
        return self.part_bytes("plain", own) + layers

    # -- experts ------------------------------------------------------------------------------

    @cached_property
    def moe_layers(self) -> tuple[Layer, ...]:
        """The layers with routed experts."""
        return tuple(layer for layer in self.layers if layer.num_experts)

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer (the most, where layers differ); 0 for a dense model."""
        return max((layer.num_experts for layer in self.layers), default=0)

    @property
    def top_k_experts(self) -> int:
        """Experts a token uses in an MoE layer."""
        return max((layer.top_k_experts for layer in self.layers), default=0)

    @property
    def expert_dtype(self) -> str:
        """How routed experts are stored."""
        return self.quantised.get("expert", self.plain_dtype)

    @property
    def matrix_dtype(self) -> str:
        """How the matrices that do most of the work are stored."""
        part = "expert" if self.moe_layers else "mlp"
        return self.quantised.get(part, self.plain_dtype)

    # -- KV -----------------------------------------------------------------------------------

    def kv_bytes_per_token(self, kv_dtype: str, *, tp: int = 1) -> int:
        """Bytes each further token adds for one user once every window is full.

        On each of `tp` ranks; of all keys and values with one.
        """
        grow = sum(
            n * a.token_bytes(kv_dtype) // a.shards(tp)
            for a, _, n in self.readers
            if not a.cache.window
        )
        return grow + self.index_bytes_per_token

    def kv_bytes_per_early_token(self, kv_dtype: str) -> int:
        """Bytes a token adds while it is inside every window: all layers that cache."""
        cached = sum(n * a.token_bytes(kv_dtype) for a, _, n in self.readers)
        return cached + self.index_bytes_per_token

    @cached_property
    def index_bytes_per_token(self) -> int:
        """Bytes of a token's index keys over all layers; each step reads those of all tokens."""
        dtype = self.plain_dtype if self.index_dtype == "auto" else self.index_dtype
        return sum(n * a.indexer.key_bytes(dtype) for a, _, n in self.readers if a.indexer)

    @cached_property
    def index_pair_flops(self) -> int:
        """Operations to score one token's index keys for one query, over all layers."""
        return sum(n * a.indexer.pair_flops for a, _, n in self.readers if a.indexer)

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent and convolutional state of one user, whatever the context."""
        return sum(n * a.cache.sequence_bytes for a, _, n in self.readers)

    def kv_bytes(
        self,
        context: float,
        kv_dtype: str,
        *,
        tp: int = 1,
        block_size: int = 1,
        hold_windows: bool = True,
    ) -> int:
        """Bytes one user of `context` tokens keeps on each of `tp` ranks.

        With `tp` 1 that is one whole copy. A rank holds its share of the KV heads, at least one;
        of MLA's latent and of index keys it holds everything; of recurrent state its share.

        Args:
            context: tokens of prompt and answer so far.
            kv_dtype: key of `KV_BYTES`.
            tp: tensor-parallel ranks.
            block_size: the context is rounded up to whole blocks of this many tokens.
            hold_windows: whether the engine frees what a window has left behind; False holds every
                token in every layer, as engines without a hybrid allocator do.
        """
        rounded = math.ceil(context / block_size) * block_size
        total = float(rounded * self.index_bytes_per_token)
        for a, _, n in self.readers:
            held = a.kept_tokens(rounded) if hold_windows else rounded
            total += n * (held * a.token_bytes(kv_dtype) / a.shards(tp) + a.state_bytes(tp))
        return math.ceil(total)

    def kv_read_bytes(self, context: float, kv_dtype: str, *, tp: int = 1) -> float:
        """Bytes one decode step reads on each rank for one user, without index keys.

        Recurrent state is also written back.
        """
        return sum(
            n
            * (
                a.seen_tokens(context) * owner.token_bytes(kv_dtype) / owner.shards(tp)
                + 2 * a.state_bytes(tp)
            )
            for a, owner, n in self.readers
        )

    def attention_flops_per_token(self, context: float, *, tp: int = 1) -> float:
        """Operations that scores, weighted sums and states of one decoded token take on a rank."""
        return sum(
            n
            * (
                2 * a.seen_tokens(context) * a.num_heads * (a.score_dim + a.mix_dim)
                + 4 * a.state_values
            )
            / (tp if a.shares.are_cut(tp) else 1)
            for a, _, n in self.readers
        )

    def prefill_attention_flops(
        self,
        new_tokens: float,
        past_tokens: float = 0.0,
        *,
        chunk: float = math.inf,
        tp: int = 1,
    ) -> float:
        """Operations that causal attention to `new_tokens` after `past_tokens` takes on a rank.

        They are computed in steps of at most `chunk` tokens, each of which makes keys and values of
        the latents before it once more.
        """
        num_steps = max(1, math.ceil(new_tokens / chunk)) if self.is_mla else 1
        size = new_tokens / num_steps
        return sum(
            n
            * a.prefill_flops(size, past_tokens + step * size)
            / (tp if a.shares.are_cut(tp) else 1)
            for a, _, n in self.readers
            for step in range(num_steps)
        )

    @property
    def min_kv_heads(self) -> int:
        """Fewest cached heads of any layer that caches: tensor parallelism beyond it copies KV."""
        return min((n for a, _, _ in self.readers if (n := a.cache.num_kv_heads)), default=1)

    @property
    def is_mla(self) -> bool:
        """Whether KV is a latent that each tensor-parallel rank holds whole."""
        return any(a.kind is Kind.MLA for a, _, _ in self.readers)

    @property
    def num_heads(self) -> tuple[int, ...]:
        """The distinct counts of query heads."""
        return tuple(sorted({a.num_heads for a, _, _ in self.readers if a.num_heads}))

    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind of attention."""
        counts: dict[str, int] = {}
        for attention, _, n in self.readers:
            counts[attention.kind.value] = counts.get(attention.kind.value, 0) + n
        return counts

    @cached_property
    def readers(self) -> tuple[tuple[Attention, Attention, int], ...]:
        """Distinct attentions, each with the one whose cache it reads, and how many layers.

        That is itself, but for a SHARED layer: the last layer before it that keeps a cache and
        looks as far back.
        """
        counts: dict[tuple[Attention, Attention], int] = {}
        keepers: dict[int | None, Attention] = {}
        for attention in (layer.attention for layer in self.layers):
            owner = attention
            if attention.kind is Kind.SHARED:
                if attention.window not in keepers:
                    raise PlanError(
                        f"{self.name} has a layer that shares KV before any layer keeps some"
                    )
                owner = keepers[attention.window]
            elif attention.kind in (Kind.FULL, Kind.SLIDING, Kind.CHUNKED, Kind.MLA):
                keepers[attention.window] = attention
            counts[attention, owner] = counts.get((attention, owner), 0) + 1
        return tuple((a, owner, n) for (a, owner), n in counts.items())
