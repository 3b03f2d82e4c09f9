"""What one layer asks of its attention."""

from dataclasses import dataclass, field

import torch

from hotset.attention.latent import LatentWeights
from hotset.cost.attention import Indexer
from hotset.cost.cache_spec import KeysValues, Latent, StoredSpec


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of its attention, and what it caches.

    Attributes:
        cache: the keys and values, or latents, as the layer hands them over. With a window, a token
            sees itself and one token less than `window` before it.
        num_heads: query heads; a query is as wide as a key.
        scaling: factor on the products of queries and keys.
        softcap: scores become `softcap * tanh(score / softcap)`; None leaves them.
        dtype: of queries and outputs.
        sinks: `[num_heads]`, a logit per head that takes part in the softmax and is dropped; the
            model's own weights.
        latent: what makes keys and values of latents, of the model's own weights; None where it
            caches keys and values.
        indexer: how the tokens are selected that it attends to, None for all; with one of its own
            it caches a key of that too.
    """

    cache: StoredSpec
    num_heads: int
    scaling: float
    softcap: float | None
    dtype: torch.dtype
    sinks: torch.Tensor | None = field(default=None, compare=False)
    latent: LatentWeights | None = field(default=None, compare=False)
    indexer: Indexer | None = None

    @property
    def heads(self) -> KeysValues:
        """The keys and values that are attended to, of latents those that are made of them."""
        return self.cache.expanded if isinstance(self.cache, Latent) else self.cache

    @property
    def index_dim(self) -> int:
        """Width of the indexer's key that a token leaves in the cache; 0 for none."""
        return 0 if self.indexer is None or self.indexer.is_shared else self.indexer.key_dim

    @property
    def is_plain(self) -> bool:
        """Whether it attends to all keys in its window, by a softmax of scaled scores."""
        return (
            self.latent is None
            and self.indexer is None
            and self.softcap is None
            and self.sinks is None
        )
