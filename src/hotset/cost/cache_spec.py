"""What a layer caches: one byte count for planner, arena and attention.

A model is a sequence of one `CacheSpec` per layer. Each says which numbers a token adds
(`token_values`), what a sequence takes beside its tokens (`sequence_bytes`), in how many heads the
cache can be cut (`num_kv_heads`) and how many tokens it keeps (`window`; None: all). A model's own
spec says the least that has to be kept; `stored` is what this engine keeps in its place.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

STATE_BYTES = 4  # recurrent state is kept in float32
_SCALE_BYTES = 4  # of an index key in 8 bits, in float32
# In the number of a block whose rows are of something else: its index keys alone are meant.
KEYS_ALONE = 1 << 30
_STATE_ALIGNMENT = 16  # of a sequence's state, so that kernels can read whole words


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

    def absorbed_flops(self, pairs: float) -> float:
        """Operations of all heads for `pairs` of a query and a token, over latents themselves."""
        return 2.0 * self.expanded.num_kv_heads * (2 * self.rank + self.rope_dim) * pairs

    def expanded_flops(self, pairs: float, past: float) -> float:
        """The same over keys and values, which are made of the latents of `past` tokens as well.

        Rows of a step's own tokens are not counted: to make them takes the operations that absorb
        a query and turn its output into values, so that both ways have them.
        """
        heads = self.expanded
        made = self.rank * (heads.key_dim - self.rope_dim + heads.value_dim)
        per_pair = heads.key_dim + heads.value_dim
        return 2.0 * heads.num_kv_heads * (per_pair * pairs + made * past)

    @property
    def stored(self) -> "Latent":
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class State:
    """A state of fixed size per sequence: linear attention, state space, convolution.

    Attributes:
        recurrent: shape of the float32 numbers of recurrent state, heads first; empty for none.
        conv: channels of the convolution, and the columns of its input that it looks back at.
        conv_itemsize: bytes of a number in these columns.
    """

    recurrent: tuple[int, ...]
    conv: tuple[int, int]
    conv_itemsize: int = 2

    num_kv_heads = 0
    window = None
    token_values = 0

    @property
    def num_values(self) -> int:
        """Numbers of recurrent state."""
        return math.prod(self.recurrent) if self.recurrent else 0

    @property
    def conv_bytes(self) -> int:
        """Bytes of the columns of a sequence."""
        return math.prod(self.conv) * self.conv_itemsize

    @property
    def scanned_values(self) -> int:
        """Numbers that a step has of a token at once.

        Those that the convolution takes and gives; of each head queries, keys and values, their
        copies and products with the decay.
        """
        heads, *widths = self.recurrent or (0,)
        return 3 * self.conv[0] + 6 * heads * sum(widths)

    @property
    def sequence_bytes(self) -> int:
        """Bytes of a sequence, whatever its length."""
        return self.num_values * STATE_BYTES + self.conv_bytes

    @property
    def stored(self) -> "State":
        """Itself."""
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
# heads take: a block of as many bytes has more tokens. Recurrences are computed in chunks of 64.
_BLOCK_SIZE, _LONG_BLOCK_SIZE = 16, 64


def default_block_size(specs: Iterable[CacheSpec]) -> int:
    """Tokens of a block of a model whose layers store `specs`."""
    return _LONG_BLOCK_SIZE if any(map(_wants_long_blocks, specs)) else _BLOCK_SIZE


def _wants_long_blocks(spec: CacheSpec) -> bool:
    return isinstance(spec, Latent) or (isinstance(spec, State) and bool(spec.recurrent))


def groups_of(selects: Sequence[bool]) -> list[range]:
    """Layers whose rows of a token lie side by side in a block.

    Args:
        selects: of each layer, whether an indexer of its own selects tokens.

    Returns:
        A layer that selects and those after it that take its selection; each layer alone where none
        selects.
    """
    starts = [i for i, one in enumerate(selects) if one or i == 0 or not any(selects)]
    return [range(first, end) for first, end in pairwise([*starts, len(selects)])]


def state_slot_bytes(specs: Iterable[State]) -> int:
    """Bytes of the state of one sequence over all layers, rounded up to whole words."""
    num_bytes = sum(spec.sequence_bytes for spec in specs)
    return -(-num_bytes // _STATE_ALIGNMENT) * _STATE_ALIGNMENT


def index_key_bytes(width: int, itemsize: int) -> int:
    """Bytes of the index key that a token leaves in a layer; 8-bit numbers share a scale."""
    scale = _SCALE_BYTES if itemsize == 1 and width else 0
    return width * itemsize + scale


def token_bytes(specs: Iterable[CacheSpec], itemsize: int) -> int:
    """Bytes that one token adds over all layers, its numbers `itemsize` bytes each."""
    return itemsize * sum(spec.token_values for spec in specs)


def index_places(block: int, row_bytes: int, index_bytes: int) -> range:
    """Where the rows of one block have room for the index keys of others.

    Numbers of places for the index keys of a block, which follow each other from the rows of block
    0 on; a place lies within one block.
    """
    start = -(-block * row_bytes // index_bytes)
    return range(start, (block + 1) * row_bytes // index_bytes)
