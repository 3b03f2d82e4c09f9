"""Running a transformers model for one step over the paged KV cache."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from hotset.errors import ModelError
from hotset.memory.arena import DeviceArena, LayerShape
from hotset.model.attention import (
    IMPLEMENTATION,
    Attention,
    LayerAttention,
    PagedAttention,
    ProbeAttention,
    SequenceSpan,
    register,
)
from hotset.model.cpu_linear import pack_linears
from hotset.model.flashinfer_attention import FlashInferBackend, why_unsupported
from hotset.request import StepPlan

_log = logging.getLogger(__name__)

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What each layer of a model asks of its attention, and what a token leaves in the cache."""

    layers: tuple[LayerAttention, ...]
    dtype: torch.dtype

    @property
    def kv_shapes(self) -> tuple[LayerShape, ...]:
        """What each layer caches for a token."""
        return tuple(layer.kv for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        values = sum(2 * shape.num_kv_heads * shape.head_dim for shape in self.kv_shapes)
        return values * self.dtype.itemsize


def inspect_model(model: PreTrainedModel) -> ModelLayout:
    """Switch `model` to paged attention and find out what it caches, by running two tokens.

    Raises:
        ModelError: the model cannot run over a paged KV cache; says which part of it and why.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder: only decoders are supported")
    layer_types = getattr(config, "layer_types", None) or []
    if unknown := sorted(set(layer_types) - _KNOWN_LAYER_TYPES):
        raise ModelError(
            f"{name} has layers of type {', '.join(unknown)}: "
            f"supported are {', '.join(sorted(_KNOWN_LAYER_TYPES))}"
        )
    register()
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{name} does not use transformers' attention interface") from error
    probe = ProbeAttention()
    try:
        with torch.inference_mode():
            tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            positions = torch.arange(2, device=model.device).unsqueeze(0)
            model(input_ids=tokens, position_ids=positions, use_cache=False, hotset=probe)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} cannot run with paged attention: {error}") from error
    num_layers = config.num_hidden_layers
    missing = [layer for layer in range(num_layers) if layer not in probe.layers]
    if missing or len(probe.layers) != num_layers:
        raise ModelError(
            f"{name}: {len(missing)} of {num_layers} layers (first: layer {missing[:1]}) do not "
            "use transformers' attention interface, so their state cannot be paged"
        )
    for layer, layer_type in enumerate(layer_types):
        if (layer_type == "sliding_attention") != (probe.layers[layer].sliding_window is not None):
            raise ModelError(
                f"{name}: layer {layer} is {layer_type} but its window does not say so"
            )
    return ModelLayout(tuple(probe.layers[i] for i in range(num_layers)), model.dtype)


def workspace_bytes(model: PreTrainedModel, *, max_tokens: int, max_seqs: int) -> int:
    """What a step of `max_tokens` tokens takes at most beside weights and KV; an upper estimate.

    Live at once: the residual stream and its norm, queries, keys and values, the two halves of
    the feed-forward and their product; then the logits of `max_seqs` tokens and their float32
    copy. Experts compute `top_k` rows a token.
    """
    config = model.config.get_text_config()
    hidden: int = config.hidden_size
    ffn = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts_ffn := getattr(config, "moe_intermediate_size", None):
        ffn = max(ffn, experts_ffn * getattr(config, "num_experts_per_tok", 1))
    per_token = 6 * hidden + 3 * ffn
    itemsize: int = model.dtype.itemsize
    rows = min(max_seqs, max_tokens)
    vocab_size: int = config.vocab_size
    return max_tokens * per_token * itemsize + rows * vocab_size * (itemsize + 4)


class AttentionBackend(Protocol):
    """Makes the attention of one step after another."""

    def begin_step(self, sequences: Sequence[SequenceSpan]) -> Attention:
        """The attention of a step of these sequences; good until the next call."""
        ...


class GatherBackend:
    """PyTorch's SDPA over gathered blocks; see `PagedAttention`."""

    def __init__(self, arena: DeviceArena) -> None:
        self._arena = arena

    def begin_step(self, sequences: Sequence[SequenceSpan]) -> Attention:
        """See `AttentionBackend`."""
        return PagedAttention(self._arena, sequences)


def choose_backend(arena: DeviceArena, layout: ModelLayout) -> AttentionBackend:
    """FlashInfer on a GPU, for the models that it can run; SDPA for the others."""
    if arena.storage.device.type != "cuda":
        return GatherBackend(arena)
    reason = why_unsupported(layout.layers, layout.dtype)
    if reason is not None:
        _log.warning("FlashInfer cannot run %s: attention by SDPA, which is slower", reason)
        return GatherBackend(arena)
    return FlashInferBackend(arena, layout.layers)


class ModelRunner:
    """Turns a step plan into tensors, runs the model, and returns logits."""

    def __init__(
        self, model: PreTrainedModel, arena: DeviceArena, attention: AttentionBackend
    ) -> None:
        pack_linears(model)
        self._model = model
        self._arena = arena
        self._attention = attention
        parameters = inspect.signature(model.forward).parameters
        self._selects_logits = "logits_to_keep" in parameters

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan's tokens and store their KV.

        Returns:
            `[R, vocab]` logits, a row for each item that samples, in the plan's order.
        """
        self._arena.copy_blocks(plan.copies)
        device = self._model.device
        token_ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        spans: list[SequenceSpan] = []
        for item in plan.items:
            end = item.start + item.num_tokens
            spans.append(
                SequenceSpan(len(token_ids), item.num_tokens, end, item.request.block_table)
            )
            token_ids += item.request.token_ids[item.start : end]
            positions += range(item.start, end)
            if item.samples:
                last_rows.append(len(token_ids) - 1)
        rows = torch.tensor(last_rows, dtype=torch.long, device=device)
        options = {"logits_to_keep": rows} if self._selects_logits else {}
        output = self._model(
            input_ids=torch.tensor(token_ids, device=device).unsqueeze(0),
            position_ids=torch.tensor(positions, device=device).unsqueeze(0),
            use_cache=False,
            hotset=self._attention.begin_step(spans),
            **options,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if self._selects_logits else logits[rows]
