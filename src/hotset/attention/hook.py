"""Paged attention behind transformers' attention interface.

`register` makes one function known to transformers under `IMPLEMENTATION`. The object that does
the work travels with each forward call as the keyword argument `hotset`; nothing is global.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from hotset.attention.batch import Batch, Inputs, SequenceSpan
from hotset.errors import ModelError
from hotset.linear.fp8 import FP8, to_fp8
from hotset.memory.arena import DeviceArena, LayerShape

IMPLEMENTATION = "hotset"

# Keyword arguments that transformers passes along and that do not change the result here:
# training-only, outputs nobody asks for, or positions that are in the keys already.
_NEUTRAL_ARGUMENTS = {
    "dropout",
    "position_ids",
    "cache_position",
    "use_cache",
    "past_key_values",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "output_router_logits",
    "position_embeddings",
    "is_causal",
    "logits_to_keep",
}

# Layers whose keys a probe keeps. Some of them see positions; later ones may follow other experts.
_FIRST_LAYERS = 4

# Padding of a group of decodes to its longest context may cost at most this share.
_MAX_PADDING = 1.25


class Attention(Protocol):
    """What the registered function calls: attention of all tokens of a step over one layer."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend; T = tokens of the step, H = heads, D = head dim.

        Args:
            layer: index of the layer's KV.
            query: `[H, T, D]`.
            key: `[H_kv, T, D]`, to be stored first.
            value: `[H_kv, T, D_v]`, likewise.
            scaling: factor on the products of queries and keys.
            sliding_window: a token sees itself and this many less one before it; None sees all.
            softcap: scores become `softcap * tanh(score / softcap)`.
            sinks: `[H]`, a logit per head that takes part in the softmax and is dropped.

        Returns:
            `[T, H, D_v]`.
        """
        ...


def register(*, traced: bool = True) -> None:
    """Make `IMPLEMENTATION` known to transformers. It asks for no mask, so none is built.

    `traced=False` hides it from `torch.compile`, which then compiles what is before and after.
    """
    AttentionInterface.register(IMPLEMENTATION, _attention_forward if traced else _untraced())


@functools.cache  # compiled code is made for this very function
def _untraced() -> Any:
    return torch.compiler.disable(_attention_forward)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    hotset: Attention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    name = type(module).__name__
    if hotset is None:
        raise ModelError(f"{name} does not pass keyword arguments to its attention: not supported")
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _NEUTRAL_ARGUMENTS]
    if unknown or attention_mask is not None:
        what = ", ".join(unknown) or "attention_mask"
        raise ModelError(f"{name} asks its attention for {what}: not supported")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ModelError(f"{name} is not causal: not supported")
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = hotset.attend(
        layer,
        query[0],
        key[0],
        value[0],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of its attention, and what it caches for one token."""

    kv: LayerShape
    num_heads: int
    query_dim: int
    value_dim: int
    scaling: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool
    dtype: torch.dtype


class ProbeAttention:
    """Records what each layer that calls it asks for; its result is zeros.

    One forward pass with it tells what has to be cached, for any architecture.

    Attributes:
        layers: what each called for, by its index.
        rows_are_alike: whether the first and the last row were always the same; the pass is to give
            them the same token at the same position.
        first_keys: `[H_kv, T, D]` of the first few layers.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}
        self.rows_are_alike = True
        self.first_keys: list[torch.Tensor] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Note the call and return zeros."""
        if layer in self.layers:
            raise ModelError(f"layer {layer} calls its attention twice a step: not supported")
        self.layers[layer] = LayerAttention(
            kv=LayerShape(key.shape[0], max(key.shape[-1], value.shape[-1])),
            num_heads=query.shape[0],
            query_dim=query.shape[-1],
            value_dim=value.shape[-1],
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            has_sinks=sinks is not None,
            dtype=query.dtype,
        )
        rows = [tensor.transpose(0, 1) for tensor in (query, key, value)]
        self.rows_are_alike = self.rows_are_alike and all(map(ends_are_alike, rows))
        if len(self.first_keys) < _FIRST_LAYERS:
            self.first_keys.append(key.clone())
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])


def ends_are_alike(rows: torch.Tensor) -> bool:
    """Whether the first and the last of `[T, ...]` rows are alike."""
    return are_alike(rows[0], rows[-1])


def are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a shape agree but for rounding; True on `meta`."""
    if one.is_meta:
        return True
    bound = torch.finfo(one.dtype).eps ** 0.5 * one.float().abs().max()
    return bool((one.float() - other.float()).abs().max() <= bound)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences whose attention is one SDPA call.

    Attributes:
        tokens: `[R * Q]` rows of the flat batch, R sequences of Q tokens each.
        table: `[R * N]` block ids, padded with block 0.
        mask: `[R, 1, Q, N * block_size]`, 0 where a query sees a key and -inf elsewhere.
    """

    tokens: torch.Tensor
    num_sequences: int
    table: torch.Tensor
    mask: torch.Tensor


class PagedAttention:
    """Attention of one step over gathered blocks by PyTorch's SDPA: any device, any dtype.

    Decodes of similar context length share one call; a prefill chunk has one of its own. Query
    heads that share a KV head are folded into the query length, so keys are never expanded.
    """

    def __init__(self, arena: DeviceArena, batch: Batch, inputs: Inputs) -> None:
        self._arena = arena
        self._sequences = batch.sequences
        self._slots = (inputs.blocks, inputs.offsets)
        self._groups: dict[int | None, list[_Group]] = {}  # by sliding window

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend. See `Attention`."""
        cache = self._arena.layers[layer]  # [num_blocks, 2, block_size, H_kv, D]
        num_kv_heads, head_dim = cache.shape[3:]
        value_dim = value.shape[-1]
        key_scale, value_scale = self._arena.scales[layer]
        is_fp8 = cache.dtype == FP8
        if is_fp8:  # moved as bytes: not every indexing operation knows 8-bit floats
            cache = cache.view(torch.uint8)
            key = to_fp8(key, key_scale).view(torch.uint8)
            value = to_fp8(value, value_scale).view(torch.uint8)
        cache[:, 0, :, :, : key.shape[-1]][self._slots] = key.transpose(0, 1)
        cache[:, 1, :, :, :value_dim][self._slots] = value.transpose(0, 1)

        num_heads, num_tokens, query_dim = query.shape
        output = query.new_empty(num_tokens, num_heads, value_dim)
        keys, values = cache[:, 0].flatten(1), cache[:, 1].flatten(1)  # strided rows, no copy
        for group in self._groups_for(sliding_window, query.dtype):
            r = group.num_sequences
            gathered = (r, -1, num_kv_heads, head_dim)
            k = keys.index_select(0, group.table).view(gathered).transpose(1, 2)
            v = values.index_select(0, group.table).view(gathered).transpose(1, 2)
            if is_fp8:
                k, v = k.view(FP8).to(query.dtype), v.view(FP8).to(query.dtype)
            q = (
                query[:, group.tokens].view(num_heads, r, -1, query_dim).transpose(0, 1)
            )  # [R, H, Q, D]
            out = grouped_query_attention(
                q,
                k[..., :query_dim],
                v[..., :value_dim],
                group.mask,
                scaling=scaling * key_scale,
                softcap=softcap,
                sinks=sinks,
            )
            out = out if value_scale == 1 else out * value_scale
            output[group.tokens] = out.transpose(1, 2).flatten(0, 1)
        return output

    def _groups_for(self, window: int | None, dtype: torch.dtype) -> list[_Group]:
        if window not in self._groups:
            decodes = sorted(
                (s for s in self._sequences if s.num_tokens == 1), key=lambda s: s.context_len
            )
            groups: list[list[SequenceSpan]] = [[s] for s in self._sequences if s.num_tokens > 1]
            pending: list[SequenceSpan] = []
            for seq in decodes:
                if pending and seq.context_len > pending[0].context_len * _MAX_PADDING + 16:
                    groups.append(pending)
                    pending = []
                pending.append(seq)
            if pending:
                groups.append(pending)
            self._groups[window] = [self._make_group(group, window, dtype) for group in groups]
        return self._groups[window]

    def _make_group(
        self, group: Sequence[SequenceSpan], window: int | None, dtype: torch.dtype
    ) -> _Group:
        size, device = self._arena.block_size, self._arena.storage.device
        num_queries = group[0].num_tokens
        context = torch.tensor([s.context_len for s in group], device=device)
        first_visible = [
            0 if window is None else max(0, s.context_len - num_queries - window + 1) for s in group
        ]
        first_blocks = [position // size for position in first_visible]
        tables = [
            list(s.block_table[first : -(-s.context_len // size)])
            for s, first in zip(group, first_blocks, strict=True)
        ]
        width = max(len(table) for table in tables)
        # Behind their masks are blocks of their own: nobody knows what is in others.
        table = torch.tensor([t + t[:1] * (width - len(t)) for t in tables], device=device)
        keys_at = torch.arange(width * size, device=device)
        key_position = torch.tensor(first_blocks, device=device)[:, None] * size + keys_at
        query_position = context[:, None] - num_queries + torch.arange(num_queries, device=device)
        distance = query_position[:, :, None] - key_position[:, None, :]  # [R, Q, N * size]
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
        rows = torch.tensor([s.start for s in group], device=device)[:, None] + torch.arange(
            num_queries, device=device
        )
        bias = torch.zeros_like(mask, dtype=dtype)
        bias.masked_fill_(~mask, -torch.inf)
        return _Group(rows.flatten(), len(group), table.flatten(), bias.unsqueeze(1))


def grouped_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with H query heads over H_kv key heads, H a multiple of H_kv.

    Args:
        query: `[R, H, Q, D]`.
        key: `[R, H_kv, S, D]`.
        value: `[R, H_kv, S, D_v]`.
        mask: `[R, 1, Q, S]`, dtype of `query`: 0 where a query sees a key (at least one a row),
            -inf elsewhere.
        scaling: factor on the scores.
        softcap: see `Attention.attend`.
        sinks: `[H]` or None; see `Attention.attend`.

    Returns:
        `[R, H, Q, D_v]`.
    """
    r, num_heads, num_queries, _ = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    folded = query.reshape(r, num_kv_heads, group * num_queries, -1)
    mask = mask.repeat(1, 1, group, 1) if num_queries > 1 else mask
    if softcap is None and sinks is None:
        out = functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=scaling
        )
        return out.reshape(r, num_heads, num_queries, -1)
    scores = torch.matmul(folded, key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + mask).float()
    if sinks is not None:
        column = sinks.float().view(1, num_kv_heads, group, 1)
        column = column.expand(r, -1, -1, num_queries).reshape(r, num_kv_heads, -1, 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights.to(value.dtype), value).reshape(r, num_heads, num_queries, -1)
