"""What a layer caches: one byte count for planner, arena and attention.

A model is a sequence of one `CacheSpec` per layer. Each says which numbers a token adds
(`token_values`), what a sequence takes beside its tokens (`sequence_bytes`), in how many heads the
cache can be cut (`num_kv_heads`) and how many tokens it keeps (`window`; None: all). A model's own
spec says the least that has to be kept; `stored` is what this engine keeps in its place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

STATE_BYTES = 4  # recurrent state is kept in float32
CONV_STATE_BYTES = 2


@dataclass(frozen=True, slots=True)
class KeysValues:
    """A key and a value per token and KV head.

    Attributes:
        num_kv_heads: heads of keys and values.
        key_dim: width of a head's key.
        value_dim: width of a head's value.
        window: the layer looks at this many tokens at most and needs no older ones; None: at all.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    sequence_bytes = 0

    @property
    def token_values(self) -> int:
        """Numbers that one token adds."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)

    @property
    def stored(self) -> "KeysValues":
        """The same as the engine's arena stores it: all tokens, keys and values of one width."""
        width = max(self.key_dim, self.value_dim)
        return KeysValues(self.num_kv_heads, width, width)


@dataclass(frozen=True, slots=True)
class Latent:
    """One latent per token, which serves as key and value of all heads (MLA).

    Attributes:
        rank: width of the latent.
        rope_dim: width of the rotary key beside it.
        expanded: the keys and values of all heads that a layer makes of it.
    """

    rank: int
    rope_dim: int
    expanded: KeysValues

    num_kv_heads = 1
    window = None
    sequence_bytes = 0

    @property
    def token_values(self) -> int:
        """Numbers that one token adds."""
        return self.rank + self.rope_dim

    @property
    def ds_mla_token_bytes(self) -> int:
        """Bytes of a token in vLLM's and FlashMLA's layout of FP8.

        The latent in FP8 with a float32 scale per 128 values, the rotary part in bfloat16.
        """
        return self.rank + 4 * (self.rank // 128) + 2 * self.rope_dim

    @property
    def stored(self) -> "Latent":
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class State:
    """A state of fixed size per sequence: linear attention, state space, convolution.

    Attributes:
        num_values: float32 numbers of recurrent state.
        num_conv_values: 16-bit numbers of convolution state.
    """

    num_values: int
    num_conv_values: int

    num_kv_heads = 0
    window = None
    token_values = 0

    @property
    def sequence_bytes(self) -> int:
        """Bytes of a sequence, whatever its length."""
        return self.num_values * STATE_BYTES + self.num_conv_values * CONV_STATE_BYTES

    @property
    def stored(self) -> "State":
        """Itself: the engine runs no such layer so far."""
        return self


@dataclass(frozen=True, slots=True)
class Shared:
    """Nothing of its own: the layer reads the keys and values of an earlier one.

    Attributes:
        read: what it reads.
    """

    read: KeysValues

    num_kv_heads = 0
    window = None
    token_values = 0
    sequence_bytes = 0

    @property
    def stored(self) -> KeysValues:
        """What it reads once more: the engine stores what each layer's attention is handed."""
        return self.read.stored


@dataclass(frozen=True, slots=True)
class NoCache:
    """Nothing: the layer has no attention."""

    num_kv_heads = 0
    window = None
    token_values = 0
    sequence_bytes = 0

    @property
    def stored(self) -> "NoCache":
        """Itself."""
        return self


CacheSpec: TypeAlias = KeysValues | Latent | State | Shared | NoCache
StoredSpec: TypeAlias = KeysValues | Latent  # what the engine's arena takes

# Tokens of a block where the user names none. A latent is a tenth of what keys and values of eight
# heads take: a block of as many bytes has more tokens.
_BLOCK_SIZE, _LATENT_BLOCK_SIZE = 16, 64


def default_block_size(specs: Iterable[CacheSpec]) -> int:
    """Tokens of a block of a model whose layers store `specs`."""
    return _LATENT_BLOCK_SIZE if any(isinstance(s, Latent) for s in specs) else _BLOCK_SIZE


def token_bytes(specs: Iterable[CacheSpec], itemsize: int) -> int:
    """Bytes that one token adds over all layers, its numbers `itemsize` bytes each."""
    return itemsize * sum(spec.token_values for spec in specs)
