"""Paged attention by PyTorch's SDPA over gathered blocks: any device, any dtype."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hotset.attention.batch import SEAT, Batch, SequenceSpan
from hotset.attention.grouped import grouped_query_attention
from hotset.attention.hot_rows import HotRows
from hotset.attention.inputs import Inputs
from hotset.attention.latent import LatentWeights
from hotset.attention.paged_decodes import PagedDecodes, can_attend, shape_of
from hotset.attention.sparse.drawn import DrawnSelection
from hotset.attention.sparse.gathered import GatheredSelection
from hotset.attention.sparse.indexer import Index
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.attention.sparse.rounded import store_keys
from hotset.attention.spec import LayerAttention
from hotset.linear.fp8 import FP8, to_fp8
from hotset.memory.arena import DeviceArena

# Padding of a group of decodes to its longest context may cost at most this share.
_MAX_PADDING = 1.25


class GatherBackend:
    """Makes a `PagedAttention` per step; implements `AttentionBackend`."""

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        hot: HotRows | None = None,
        drawn: DrawnSelection | None = None,
    ) -> None:
        self._arena = arena
        self._layers = layers
        self._hot, self._drawn = hot, drawn
        self.recorder: SelectionRecorder | None = None

    def begin_step(self, batch: Batch, inputs: Inputs) -> "PagedAttention":
        """See `AttentionBackend`."""
        noted = self._hot, self._drawn, self.recorder
        return PagedAttention(self._arena, self._layers, batch, inputs, *noted)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences whose attention is one SDPA call.

    Attributes:
        tokens: `[R * Q]` rows of the flat batch, R sequences of Q tokens each.
        table: `[R * N]` block ids, padded with the first of each.
        mask: `[R, 1, Q, N * block_size]`, 0 where a query sees a key and -inf elsewhere.
        unwritten: sequences and positions beyond their contexts. What another request left in the
            rest of a block may be no number, which a mask does not take out.
    """

    tokens: torch.Tensor
    num_sequences: int
    table: torch.Tensor
    mask: torch.Tensor
    unwritten: tuple[torch.Tensor, ...]


class PagedAttention:
    """Attention of one step over gathered blocks by PyTorch's SDPA: any device, any dtype.

    Decodes in float32 on a CPU read blocks in place, where LLVM is there (`paged_decodes`). Others
    of similar context length share one call; a prefill chunk has one of its own. Query
    heads that share a KV head are folded into the query length, so keys are never expanded.
    """

    def __init__(
        self,
        arena: DeviceArena,
        layers: Sequence[LayerAttention],
        batch: Batch,
        inputs: Inputs,
        hot: HotRows | None,
        drawn: DrawnSelection | None,
        recorder: SelectionRecorder | None,
    ) -> None:
        self._arena = arena
        self._layers = layers
        self._sequences = batch.sequences
        self._has_padding = batch.num_padding > 0
        self._slots = (inputs.blocks, inputs.offsets)
        # By window, and whether decodes are in them.
        self._groups: dict[tuple[int | None, bool], list[_Group]] = {}
        self._decodes: dict[int | None, PagedDecodes | None] = {}  # by window
        self._selection: GatheredSelection | None = None
        if (indexer := layers[0].indexer) is not None:
            # Others attend to all that they see, whatever its scores.
            count = indexer.top_k
            self._sequences = [s for s in batch.sequences if s.context_len <= count]
            selecting = [s for s in batch.sequences if s.context_len > count]
            self._selection = GatheredSelection(
                selecting,
                arena=arena,
                count=count,
                seats=[int(batch.inputs[SEAT, s.start]) for s in selecting],
                hot=hot,
                drawn=drawn,
                recorder=recorder,
            )

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: Index | None = None,
    ) -> torch.Tensor:
        """See `StepAttention`."""
        asked = self._layers[layer]
        if asked.index_dim:
            assert index is not None and self._selection is not None
            keys, scales = self._arena.index_keys[layer], self._arena.index_scales[layer]
            if scales is None:
                keys[self._slots] = index.key[0]
            else:
                store_keys(index.key[0], keys, scales, self._slots)
            self._selection.select(layer, index)
        if asked.latent is not None:
            output = self._attend_to_latents(layer, asked.latent, query, key, value)
            if asked.index_dim and index is not None and index.guess is not None:
                assert self._selection is not None
                self._selection.guess(layer, index.guess)
            return output
        keys, values = self._arena.layers[layer].unbind(1)
        key_scale, value_scale = self._arena.scales[layer]
        self._store(keys, key, key_scale)
        self._store(values, value, value_scale)

        num_heads, num_tokens, query_dim = query.shape
        output = self._make_output(query, num_tokens, num_heads, value.shape[-1])
        window, is_read_in_place = asked.heads.window, _can_read_in_place(asked, query, keys, value)
        if is_read_in_place and (decodes := self._decodes_for(window)) is not None:
            decodes.attend(query, keys, values, output, asked.scaling)
        for group in self._groups_for(window, query.dtype, with_decodes=not is_read_in_place):
            rows = query[:, group.tokens].view(num_heads, group.num_sequences, -1, query_dim)
            out = grouped_query_attention(
                rows.transpose(0, 1),  # [R, H, Q, D]
                self._gather(keys, group, key),
                self._gather(values, group, value),
                group.mask,
                scaling=asked.scaling * key_scale,
                softcap=asked.softcap,
                sinks=asked.sinks,
            )
            out = out if value_scale == 1 else out * value_scale
            output[group.tokens] = out.transpose(1, 2).flatten(0, 1)
        return output

    def _attend_to_latents(
        self,
        layer: int,
        weights: LatentWeights,
        query: torch.Tensor,
        rotary: torch.Tensor,
        latent: torch.Tensor,
    ) -> torch.Tensor:
        """Store `[1, T, P]` rotary keys and `[1, T, R]` latents, then attend.

        Sequences of one token attend to the latents, the others to keys and values of all heads:
        both are the same but for rounding.
        """
        asked = self._layers[layer]
        cache = self._arena.layers[layer]  # [num_blocks, block_size, R + P]
        cache[self._slots] = torch.cat((latent[0], rotary[0]), dim=-1)

        num_heads, num_tokens, _ = query.shape
        rank = latent.shape[-1]
        width = self._layers[layer].heads.value_dim
        output = self._make_output(query, num_tokens, num_heads, width)
        for group in self._groups_for(None, query.dtype):
            rows = cache.index_select(0, group.table)
            rows = rows.view(group.num_sequences, -1, cache.shape[-1])  # [R, S, R + P]
            rows[group.unwritten] = 0
            asking = query[:, group.tokens]  # [H, R * Q, D]
            is_absorbed = len(group.tokens) == group.num_sequences
            if is_absorbed:
                asking = weights.absorb(asking)
                keys = rows.unsqueeze(1)
                values = keys[..., :rank]
            else:
                keys, values = weights.expand(rows)
            asking = asking.view(num_heads, group.num_sequences, -1, asking.shape[-1])
            out = grouped_query_attention(
                asking.transpose(0, 1),
                keys,
                values,
                group.mask,
                scaling=asked.scaling,
                softcap=None,
                sinks=asked.sinks,
            )
            out = out.transpose(0, 1).flatten(1, 2)  # [H, R * Q, R or D_v]
            out = weights.mix(out) if is_absorbed else out
            output[group.tokens] = out.transpose(0, 1)
        if self._selection is not None:
            self._selection.attend(
                layer, weights, query, output, scaling=asked.scaling, sinks=asked.sinks
            )
        return output

    def _make_output(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Memory that sequences fill; tokens of padding attend to nothing."""
        return like.new_zeros(*shape) if self._has_padding else like.new_empty(*shape)

    def _store(self, cache: torch.Tensor, new: torch.Tensor, scale: float) -> None:
        """Write `[H_kv, T, D]` keys or values to their places in `[N, block_size, H_kv, >= D]`."""
        if cache.dtype == FP8:  # moved as bytes: not every indexing operation knows 8-bit floats
            cache, new = cache.view(torch.uint8), to_fp8(new, scale).view(torch.uint8)
        cache[..., : new.shape[-1]][self._slots] = new.transpose(0, 1)

    def _gather(self, cache: torch.Tensor, group: _Group, new: torch.Tensor) -> torch.Tensor:
        """`[R, H_kv, S, D]` keys or values that a group attends to, in the type of `new`."""
        rows = cache.flatten(1)  # strided, no copy
        if cache.dtype == FP8:
            rows = rows.view(torch.uint8)
        found = rows.index_select(0, group.table)
        found = found.view(group.num_sequences, -1, *cache.shape[2:])
        found[group.unwritten] = 0
        found = found.transpose(1, 2)
        if cache.dtype == FP8:
            found = found.view(FP8).to(new.dtype)
        return found[..., : new.shape[-1]]

    def _groups_for(
        self, window: int | None, dtype: torch.dtype, *, with_decodes: bool = True
    ) -> list[_Group]:
        key = window, with_decodes
        if key not in self._groups:
            sequences = [s for s in self._sequences if with_decodes or s.num_tokens > 1]
            self._groups[key] = [
                self._make_group(group, window, dtype) for group in _grouped(sequences)
            ]
        return self._groups[key]

    def _decodes_for(self, window: int | None) -> PagedDecodes | None:
        if window not in self._decodes:
            decodes = [s for s in self._sequences if s.num_tokens == 1]
            size = self._arena.block_size
            self._decodes[window] = PagedDecodes(decodes, window, size) if decodes else None
        return self._decodes[window]

    def _make_group(
        self, group: Sequence[SequenceSpan], window: int | None, dtype: torch.dtype
    ) -> _Group:
        size, device = self._arena.block_size, self._arena.storage.device
        num_queries = group[0].num_tokens
        context = torch.tensor([s.context_len for s in group], device=device)
        firsts, tables = zip(*(s.visible(window, size) for s in group), strict=True)
        width = max(len(table) for table in tables)
        table = torch.tensor([t + t[:1] * (width - len(t)) for t in tables], device=device)
        keys_at = torch.arange(width * size, device=device)
        first_blocks = [first // size for first in firsts]
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
        unwritten = (key_position >= context[:, None]).nonzero(as_tuple=True)
        return _Group(rows.flatten(), len(group), table.flatten(), bias.unsqueeze(1), unwritten)


def _can_read_in_place(
    asked: LayerAttention, query: torch.Tensor, keys: torch.Tensor, value: torch.Tensor
) -> bool:
    """Whether decodes attend without gathered copies: float32 on a CPU, with nothing special."""
    is_plain = asked.is_plain and query.stride(-1) == 1
    is_float = query.dtype == keys.dtype == torch.float32
    is_here = query.device.type == "cpu"
    return is_here and is_plain and is_float and can_attend(shape_of(query, keys, value.shape[-1]))


def _grouped(sequences: Sequence[SequenceSpan]) -> list[list[SequenceSpan]]:
    """Those that share one call: decodes of similar context; a prompt is alone."""
    groups: list[list[SequenceSpan]] = [[s] for s in sequences if s.num_tokens > 1]
    decodes = (s for s in sequences if s.num_tokens == 1)
    pending: list[SequenceSpan] = []
    for seq in sorted(decodes, key=lambda s: s.context_len):
        if pending and seq.context_len > pending[0].context_len * _MAX_PADDING + 16:
            groups.append(pending)
            pending = []
        pending.append(seq)
    if pending:
        groups.append(pending)
    return groups
