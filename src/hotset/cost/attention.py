"""The attention of one layer as numbers: what it keeps of a token, reads of a context, computes."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from hotset.cost.cache_spec import CacheSpec, Latent, NoCache, Shared, State, index_key_bytes
from hotset.cost.params import Params, Shares
from hotset.errors import PlanError

# Bytes one KV element takes. fp8_ds_mla is a layout of MLA alone, see `Attention.token_bytes`.
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "fp8_ds_mla": 1}


class Kind(Enum):
    """How a layer remembers earlier tokens."""

    FULL = "full"  # a key and a value for every token
    SLIDING = "sliding"  # for the last `window` tokens
    CHUNKED = "chunked"  # for the tokens of the current chunk, at most `window`
    MLA = "mla"  # one latent for every token
    RECURRENT = "recurrent"  # a state of fixed size: linear attention, state space, convolution
    SHARED = "shared"  # reads the cache of an earlier layer
    NONE = "none"  # no attention at all


@dataclass(frozen=True, slots=True)
class Indexer:
    """How a sparse layer selects the tokens that its attention reads (DeepSeek Sparse Attention).

    Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), section 2.1.

    Attributes:
        top_k: tokens that a query attends to.
        num_heads: of the queries that are scored against the keys.
        key_dim: width of a key; a token has one per layer.
        is_shared: takes the selection of the layer before, so that it keeps no keys.
    """

    top_k: int
    num_heads: int
    key_dim: int
    is_shared: bool = False

    def key_bytes(self, dtype: str) -> int:
        """Bytes of one token's key; in fp8 with a float32 scale."""
        return index_key_bytes(0 if self.is_shared else self.key_dim, KV_BYTES[dtype])

    @property
    def pair_flops(self) -> int:
        """Operations to score one key for one query."""
        return 0 if self.is_shared else 2 * self.num_heads * self.key_dim


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention, or what stands in its place, of one layer.

    Attributes:
        kind: see `Kind`.
        params: its own weights, without the norms around it.
        shares: what ranks do not share out evenly of those, such as the down-projections of MLA.
        num_heads: query heads.
        cache: what is kept of earlier tokens.
        score_dim: width of one query-key product as decode computes it.
        mix_dim: width of one weighted sum as decode computes it.
        window: most tokens the layer looks at; None looks at all.
        indexer: of a sparse layer; None looks at all that `window` leaves.
        grouped_channels: of a convolution, those that come with the units of `shares`.
    """

    kind: Kind
    params: Params = field(default_factory=Params)
    shares: Shares = field(default_factory=Shares)
    num_heads: int = 0
    cache: CacheSpec = field(default_factory=NoCache)
    score_dim: int = 0
    mix_dim: int = 0
    window: int | None = None
    indexer: Indexer | None = None
    grouped_channels: int = 0

    @property
    def stored(self) -> "Attention":
        """The same as this engine runs it: see `CacheSpec`."""
        same = replace(self, cache=self.cache.stored)
        if isinstance(self.cache, Shared):
            return replace(same, kind=Kind.FULL if self.window is None else Kind.SLIDING)
        return same

    def token_bytes(self, kv_dtype: str) -> int:
        """Bytes one cached token takes in this layer; 0 where the layer keeps none of its own."""
        if kv_dtype != "fp8_ds_mla" or not self.cache.token_values:
            return KV_BYTES[kv_dtype] * self.cache.token_values
        if isinstance(self.cache, Latent):
            return self.cache.ds_mla_token_bytes
        raise PlanError("KV dtype fp8_ds_mla is a layout for MLA only; use fp8 for this model")

    @property
    def most_seen(self) -> float:
        """The most tokens that a query looks at."""
        most = math.inf if self.window is None else self.window
        return min(most, self.indexer.top_k) if self.indexer else most

    def seen_tokens(self, context: float) -> float:
        """How many of `context` tokens this layer looks at."""
        return min(context, self.most_seen)

    def kept_tokens(self, context: float) -> float:
        """How many of `context` tokens this layer keeps."""
        return context if self.cache.window is None else min(context, self.cache.window)

    def prefill_flops(self, new_tokens: float, past_tokens: float) -> float:
        """Operations of causal attention for `new_tokens` of a step after `past_tokens`.

        Over latents prompts attend to keys and values that are made of them, where that takes less.
        """
        # Token i of the new ones sees past + i tokens, at most `most_seen` of them.
        pairs = causal_pairs(new_tokens, past_tokens)
        if past_tokens + new_tokens > self.most_seen:
            within = max(0.0, self.most_seen - past_tokens)
            pairs = (past_tokens + within / 2) * within + self.most_seen * (new_tokens - within)
        flops = 2 * pairs * self.num_heads * (self.score_dim + self.mix_dim)
        if isinstance(self.cache, Latent) and not self.indexer:
            flops = min(flops, self.cache.expanded_flops(pairs, past_tokens))
        return flops + 4 * self.state_values * new_tokens

    @property
    def state_values(self) -> int:
        """Numbers of recurrent state that each token updates."""
        return self.cache.num_values if isinstance(self.cache, State) else 0

    def shards(self, tp: int) -> int:
        """Parts that `tp` ranks cut its cache into: whole KV heads; MLA's latent stays whole."""
        if not self.shares.are_cut(tp):
            return 1
        return min(tp, self.cache.num_kv_heads or tp)

    def state_bytes(self, tp: int) -> int:
        """Bytes of a sequence's state on each of `tp` ranks."""
        if not isinstance(self.cache, State) or tp == 1 or not self.shares.are_cut(tp):
            return self.cache.sequence_bytes
        heads, *widths = self.cache.recurrent or (0,)
        channels, columns = self.cache.conv
        grouped = self.grouped_channels
        kept = self.shares.units(tp) * grouped // self.shares.num_units
        conv = -(-(channels - grouped) // tp) + kept, columns
        recurrent = (-(-heads // tp), *widths) if heads else ()
        return replace(self.cache, recurrent=recurrent, conv=conv).sequence_bytes


def causal_pairs(new_tokens: float, past_tokens: float) -> float:
    """Pairs of a query and a token that it may look at, of `new_tokens` after `past_tokens`."""
    return new_tokens * (past_tokens + new_tokens / 2)
