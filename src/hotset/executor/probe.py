"""What a model asks of its attention and its memory, found out by running a few tokens."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hotset.attention.hook import IMPLEMENTATION, register
from hotset.attention.latent import hand_over_latents, latent_weights
from hotset.attention.mixers import hook_mixers, step_keywords
from hotset.attention.probe import ProbeAttention, are_alike, ends_are_alike
from hotset.attention.sparse.check import check_indexers
from hotset.attention.sparse.indexer import bind_indexers, indexers, mask_arguments
from hotset.attention.sparse.rounded import check_width
from hotset.attention.spec import LayerAttention
from hotset.cost.cache_spec import (
    Latent,
    State,
    StoredSpec,
    default_block_size,
    index_key_bytes,
    token_bytes,
)
from hotset.cost.config_sizes import context_length, largest
from hotset.cost.workspace import StepWidths, step_bytes
from hotset.errors import ConfigError, HotsetError, ModelError
from hotset.executor.state_check import NOT_ATTENDING, STATE_TYPES, check_layers, check_states
from hotset.experts.gating import noting_top_k, use_dynamic_gating, without_experts
from hotset.experts.weights import experts_layers
from hotset.kv.index_blocks import fewest_per_block
from hotset.libraries import first_line, quiet
from hotset.linear.fp8 import FP8
from hotset.linear.narrow import narrow_tiles
from hotset.linear.packed import PackedLinear
from hotset.linear.quant_linear import widened_bytes
from hotset.linear.reads import noting_reads
from hotset.parallel.group import alone

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# The second is what transformers 5.17 says.
_SPARSE_LAYER_TYPES = {"indexed_attention", "deepseek_sparse_attention"}

# The probe: a text of three tokens, and behind it the first again at its position.
_TOKENS, _POSITIONS = (1, 2, 3, 1), (0, 1, 2, 0)


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What each layer of a model asks of its attention, and what a token leaves in the cache.

    Attributes:
        layers: those that attend, in their order.
        experts_per_token: that its routers choose; 0 where no layer has experts of transformers'
            interface.
        head_repeats: how often the model repeats each key before its attention, and so stores it.
        indices: of `layers` in the model; None where they are all of its layers.
        states: what layers keep of a sequence beside keys and values, by their index in the model.
        index_dtype: of the keys of indexers; None is `kv_dtype`.
    """

    layers: tuple[LayerAttention, ...]
    dtype: torch.dtype
    kv_dtype: torch.dtype
    experts_per_token: int = 0
    head_repeats: int = 1
    indices: tuple[int, ...] | None = None
    states: Mapping[int, State] = field(default_factory=dict)
    index_dtype: torch.dtype | None = None

    @property
    def kv_layers(self) -> dict[int, int]:
        """Index of a layer that attends -> which of `layers` it is."""
        indices = range(len(self.layers)) if self.indices is None else self.indices
        return {index: i for i, index in enumerate(indices)}

    @property
    def cache_specs(self) -> tuple[StoredSpec, ...]:
        """What the arena stores of each layer."""
        return tuple(layer.cache.stored for layer in self.layers)

    @property
    def default_block_size(self) -> int:
        """Tokens of a block where the user names none."""
        return default_block_size([*self.cache_specs, *self.states.values()])

    @property
    def index_dims(self) -> tuple[int, ...]:
        """Width of the indexer's key that a token leaves in each layer; 0 for none."""
        return tuple(layer.index_dim for layer in self.layers)

    @property
    def why_not_hot(self) -> str | None:
        """What keeps a request from leaving tokens to host memory, or None where nothing does."""
        if any(layer.indexer is None for layer in self.layers):
            return "its layers attend to all tokens, as no indexer selects some"
        row_bytes = {spec.token_values * self.kv_dtype.itemsize for spec in self.cache_specs}
        if len(row_bytes) > 1 or min(row_bytes) % 8:
            return "its layers store rows of different widths, or of no multiple of 8 bytes"
        if fewest_per_block(self.row_bytes, self.index_bytes) < 2:  # its own place alone
            return "its index keys, which stay on the device, are as wide as its rows"
        return None

    @property
    def row_bytes(self) -> int:
        """KV bytes of one token over all layers, without index keys."""
        return token_bytes(self.cache_specs, self.kv_dtype.itemsize)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index keys of one token over all layers."""
        itemsize = (self.index_dtype or self.kv_dtype).itemsize
        return sum(index_key_bytes(dim, itemsize) for dim in self.index_dims)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers, with its index keys."""
        return self.row_bytes + self.index_bytes


# Eagerly: an engine before this one may have compiled the layers.
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
def inspect_model(
    model: PreTrainedModel,
    kv_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype | None = None,
) -> ModelLayout:
    """Switch `model` to paged attention and find out what it caches, by running a few tokens.

    Attention over latents hands them over from then on: see `hand_over_latents`. Linear layers
    whose weight the model's code reads are marked on the way: see `linear.reads`.

    Args:
        model: in eval mode, on its device; its experts may be elsewhere, and are left out then. On
            `meta` its values are not looked at.
        kv_dtype: of the stored keys and values; None is the model's.
        index_dtype: of the keys of its indexers, float8_e4m3fn; None is the model's.

    Raises:
        ConfigError: `kv_dtype` is of 8 bits, and the model caches latents; or `index_dtype` is, and
            the model has no indexer whose keys can be rounded.
        ModelError: the model cannot run over a paged KV cache; says which part of it and why.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    check_decoder(model.config, name)
    _check_layer_types(config, name)
    _hook(model, name)
    if model.device.type != "meta":
        check_indexers(model)
    check_kv_dtype(model, kv_dtype)
    check_index_dtype(model, index_dtype)
    with noting_top_k(model) as chosen:
        probe, logits = _probe(model, _TOKENS, _POSITIONS)
    check_layers(model, list(probe.layers), probe.states)
    indices = tuple(sorted(probe.layers))
    layers = tuple(probe.layers[index] for index in indices)
    _check_windows(config, probe.layers, name)
    _check_selections(config, layers, name)
    if not (ends_are_alike(logits) and probe.rows_are_alike):
        raise ModelError(
            f"{name} computes a token from its place in the step, not from the position it is "
            "given and its token alone, so several sequences cannot share a step"
        )
    layout = ModelLayout(
        layers,
        model.dtype,
        kv_dtype or model.dtype,
        max(chosen, default=0),
        _head_repeats(probe.first_keys[0]),
        None if indices == tuple(range(config.num_hidden_layers)) else indices,
        probe.states,
        index_dtype,
    )
    if model.device.type != "meta":
        _check_numbering(model, probe)
        if layout.states:
            check_states(model, layout.layers, layout.kv_layers, layout.states)
    return layout


def check_kv_dtype(model: PreTrainedModel, kv_dtype: torch.dtype | None) -> None:
    """Raise ConfigError where latents, once `model` hands them over, are to be 8-bit floats."""
    if kv_dtype == FP8 and any(map(latent_weights, model.modules())):
        raise ConfigError(
            f"kv_dtype is fp8, but {type(model).__name__} caches latents (MLA), which are stored "
            "in the model's dtype alone; expected auto"
        )


def check_index_dtype(model: PreTrainedModel, index_dtype: torch.dtype | None) -> None:
    """Raise ConfigError where index keys of `model` are to be 8-bit floats and cannot be."""
    if index_dtype is None:
        return
    widths = {indexer.head_dim for indexer in indexers(model)}
    if not widths:
        raise ConfigError(
            f"index_dtype is fp8, but {type(model).__name__} has no indexer that selects tokens; "
            "expected auto"
        )
    for width in widths:
        check_width(width)


def _check_layer_types(config: Any, name: str) -> None:
    layer_types = getattr(config, "layer_types", None) or []
    known = _KNOWN_LAYER_TYPES | _SPARSE_LAYER_TYPES | STATE_TYPES | NOT_ATTENDING
    if unknown := sorted(set(layer_types) - known):
        raise ModelError(
            f"{name} has layers of type {', '.join(unknown)}: "
            f"supported are {', '.join(sorted(known - _SPARSE_LAYER_TYPES))}"
        )
    if layer_types and not set(layer_types) - NOT_ATTENDING:
        raise ModelError(
            f"{name} has layers of type {', '.join(sorted(set(layer_types)))} alone: at least one "
            "layer has to attend"
        )


def _head_repeats(keys: torch.Tensor) -> int:
    """How many of the heads of `[H_kv, T, D]` keys are the same, where all are as often there."""
    num_heads = keys.shape[0]
    if keys.is_meta or not keys.any():
        return 1
    num_distinct = len(torch.unique(keys.flatten(1), dim=0))
    return 1 if num_heads % num_distinct else num_heads // num_distinct


def _probe(
    model: PreTrainedModel, tokens: Sequence[int], positions: Sequence[int] | None
) -> tuple[ProbeAttention, torch.Tensor]:
    """What the layers ask for, and the `[T, vocab]` logits; None are positions of the model's own.

    Raises ModelError where it cannot run so.
    """
    probe = ProbeAttention()
    inputs = {"input_ids": torch.tensor([tokens], device=model.device), **mask_arguments(model)}
    if positions is not None:
        inputs["position_ids"] = torch.tensor([positions], device=model.device)
    try:
        with alone(), torch.inference_mode(), without_experts(model), noting_reads(model):
            output = model(**inputs, use_cache=False, **dict.fromkeys(step_keywords(model), probe))
    except HotsetError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot run on text alone with paged attention: "
            f"{first_line(error)}"
        ) from error
    return probe, output.logits[0]


def _check_windows(config: Any, layers: Mapping[int, LayerAttention], name: str) -> None:
    """Raise ModelError where layers attend over another window than the config says."""
    layer_types = getattr(config, "layer_types", None) or []
    for i, layer_type in enumerate(layer_types):
        window = layers[i].cache.window if i in layers else None
        if (layer_type == "sliding_attention") != (window is not None):
            raise ModelError(f"{name}: layer {i} is {layer_type} but its window does not say so")
    window = getattr(config, "sliding_window", None)
    if layer_types or not isinstance(window, int) or window >= (context_length(config) or window):
        return
    if all(layer.cache.window is None for layer in layers.values()):
        raise ModelError(
            f"{name} has sliding_window {window} in its config, by which transformers forgets "
            "tokens, but its attention has no window: answers would depend on how it is run"
        )


def _check_selections(config: Any, layers: Sequence[LayerAttention], name: str) -> None:
    """Raise ModelError where layers select differently, or do not although the config says so."""
    counts = {None if layer.indexer is None else layer.indexer.top_k for layer in layers}
    if len(counts) > 1:
        raise ModelError(f"{name} has layers that select different numbers of tokens: {counts}")
    layer_types = set(getattr(config, "layer_types", None) or [])
    if counts == {None} and (sparse := layer_types & _SPARSE_LAYER_TYPES):
        raise ModelError(f"{name} has layers of type {sparse.pop()} but no indexer that is known")


def _check_numbering(model: PreTrainedModel, given: ProbeAttention) -> None:
    """Raise ModelError where a text's first position is not 0, or a step is another request."""
    own, _ = _probe(model, _TOKENS[:-1], None)
    if given.layers != own.layers:
        raise ModelError(
            f"{type(model).__name__} asks its attention for other factors or windows in a step of "
            "other tokens: not supported"
        )
    for ours, theirs in zip(given.first_keys, own.first_keys, strict=True):
        if not are_alike(ours[:, :-1], theirs):
            raise ModelError(
                f"{type(model).__name__} numbers the positions of a text in a way of its own, not "
                "from 0 on: not supported"
            )


def check_decoder(config: Any, name: str) -> None:
    """Raise ModelError for the config of an encoder-decoder, or of a part of one."""
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder: only decoders are supported")


def _hook(model: PreTrainedModel, name: str) -> None:
    """Have the model's layers call ours; raise ModelError where they cannot."""
    bind_indexers(model)
    hook_mixers(model)
    _check_inputs(model)
    register()
    try:
        with quiet():  # a config may name parts that were not loaded
            model.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{name} does not use transformers' attention interface") from error
    use_dynamic_gating(model)
    hand_over_latents(model)


def _check_inputs(model: PreTrainedModel) -> None:
    """Raise ModelError for a model that wants more than tokens, or no positions with them."""
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    required = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name != "input_ids"
    ]
    if required or "input_ids" not in parameters:
        wanted = ", ".join(required) or next(iter(parameters))
        raise ModelError(f"{name} does not run on text alone: it needs {wanted}")
    get_decoder = getattr(model, "get_decoder", lambda: model)
    decoder = inspect.signature(get_decoder().forward).parameters
    if "position_ids" not in parameters and "position_ids" not in decoder:
        raise ModelError(
            f"{name} takes no position_ids: it goes by a token's place in the step, or by a state "
            "of its own, so several sequences cannot share a step"
        )


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights, packed and narrow ones too, without hosted experts."""
    narrow = sum(tiles.num_bytes for tiles in narrow_tiles(model))
    packed: int = sum(m.num_bytes for m in model.modules() if isinstance(m, PackedLinear))
    packed += sum(each.num_bytes() for each in experts_layers(model) if each.weights is None)
    return narrow + packed + sum(int(p.nbytes) for p in model.parameters())


def workspace_bytes(
    model: PreTrainedModel, layout: ModelLayout, *, max_tokens: int, max_seqs: int
) -> int:
    """What a step takes at most beside weights and KV, see `step_bytes`; one widened weight too."""
    config = model.config.get_text_config()
    widths = StepWidths(
        hidden=largest(config, "hidden_size"),
        dense=largest(config, "intermediate_size"),
        expert=largest(config, "moe_intermediate_size"),
        top_k=largest(config, "num_experts_per_tok"),
        latent=_latent_values(layout),
        vocab=config.vocab_size,
        selected=max(layer.indexer.top_k if layer.indexer else 0 for layer in layout.layers),
        scanned=max((spec.scanned_values for spec in layout.states.values()), default=0),
    )
    return widened_bytes(model) + step_bytes(
        widths,
        model.dtype.itemsize,
        device=model.device.type,
        max_tokens=max_tokens,
        max_seqs=max_seqs,
        widens=layout.kv_dtype != layout.dtype,
    )


def _latent_values(layout: ModelLayout) -> int:
    """Numbers per token of absorbed queries and their output, in the widest layer."""
    return max(
        layer.num_heads * (2 * layer.cache.rank + layer.cache.rope_dim)
        if isinstance(layer.cache, Latent)
        else 0
        for layer in layout.layers
    )
