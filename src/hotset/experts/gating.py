"""Dynamic gating: each expert computes its own tokens and no others.

The tokens are sorted by expert and counted, and every product runs over the rows that an expert
really got: no capacity, no padding, no dropped token. Source: Huang et al., "Toward Efficient
Inference for Mixture of Experts", NeurIPS 2024.
"""

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hotset.cost.config_sizes import num_experts
from hotset.experts.compute import compute_resident
from hotset.experts.weights import (
    IMPLEMENTATION,
    Experts,
    Hosted,
    LayerExperts,
    can_pack,
    experts_layers,
    experts_of,
)

_log = logging.getLogger(__name__)

# Models that compute their experts in their own way, as their users know.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def use_dynamic_gating(model: PreTrainedModel) -> int:
    """Switch the experts of `model` to dynamic gating, in place; how many layers that are.

    A model whose experts do not use transformers' experts interface, or hold quantised weights,
    is left to compute them as it does, and a warning says so, once for each model. 0 for a model
    without experts.
    """
    layers = layers_to_gate(model)
    if layers:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, dynamic_experts)
        model.set_experts_implementation(IMPLEMENTATION)
        if all(experts.is_gated for experts in layers):
            return len(layers)
    if model.device.type == "meta":  # the model itself follows, and says so then
        return 0
    has_experts = experts_layers(model) or num_experts(model.config.get_text_config()) > 1
    if has_experts and model not in _told:
        _told.add(model)
        _log.warning(
            "%s computes its experts in its own way, without dynamic gating", type(model).__name__
        )
    return 0


def layers_to_gate(model: PreTrainedModel) -> list[LayerExperts]:
    """The layers that dynamic gating computes, or would; none where it can compute some only."""
    layers = experts_layers(model)
    can_all = model not in _told and all(experts.is_plain for experts in layers)
    return layers if can_all else []


def gated_layers(model: nn.Module) -> list[LayerExperts]:
    """The layers that dynamic gating computes."""
    return [experts for experts in experts_layers(model) if experts.is_gated]


@contextlib.contextmanager
def without_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within it, experts that are on `meta` or not on the model's device add nothing."""
    layers = experts_layers(model)
    for experts in layers:
        weights = experts.weights or ()
        is_elsewhere = any(w.is_meta or w.device != model.device for w in weights)
        experts.is_skipped = is_elsewhere or experts.hosted is not None
    try:
        yield
    finally:
        for experts in layers:
            experts.is_skipped = False


@contextlib.contextmanager
def noting_top_k(model: nn.Module) -> Iterator[set[int]]:
    """Within it, the numbers of experts that tokens are routed to are added to what it gives."""
    chosen: set[int] = set()

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        ids = named.get("top_k_index", args[1] if len(args) > 1 else None)
        if ids is not None:
            chosen.add(ids.shape[-1])

    hooks = [
        experts.module.register_forward_pre_hook(note, with_kwargs=True)
        for experts in experts_layers(model)
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def pack_experts(model: nn.Module) -> None:
    """Pack the weights of float32 experts on the CPU, in place, one layer at a time.

    As `pack_linears` does, and for the same reason; only layers that dynamic gating computes. The
    stacked weights are not kept. Measured in docs/moe_study.md.
    """
    if not can_pack():
        return
    with torch.inference_mode():
        for experts in gated_layers(model):
            experts.pack()


def unpack_experts(model: nn.Module) -> None:
    """Undo `pack_experts`, in place, one layer at a time: the weights are the same bits."""
    with torch.inference_mode():
        for experts in experts_layers(model):
            experts.unpack()


def dynamic_experts(
    layer: Experts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts, wherever their weights are.

    T = tokens, K = experts of a token, E = experts of the layer, H = hidden size. With bfloat16
    weights on a GPU, and float16 ones that the fused kernels take, all shapes are fixed and nothing
    is read by the host, so that a CUDA graph can record it. Elsewhere the host reads the counts,
    and the experts that got rows run in turn.

    Args:
        layer: experts of transformers' experts interface.
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]` integer expert ids; those of E and more are another rank's and add
            nothing. Not changed.
        top_k_weights: `[T, K]`.

    Returns:
        `[T, H]`, dtype of `hidden_states`; a token's K rows are summed in the order of K, and over
        the ranks where each has a part of the experts: these compute the tokens of all lanes.
    """
    experts = experts_of(layer)
    state, shard = experts.state, experts.shard
    if experts.gather is not None:
        hidden_states, top_k_index, top_k_weights = experts.gather(
            hidden_states, top_k_index, top_k_weights
        )
    if shard is not None:
        top_k_index = shard.local_ids(top_k_index)
    if experts.counts is not None:  # routing is being recorded
        experts.counts.add(top_k_index)
    step = hidden_states, top_k_index, top_k_weights
    out: torch.Tensor
    if experts.is_skipped:
        out = torch.zeros_like(hidden_states)
    elif isinstance(state, Hosted):
        out = experts.buffer.forward(layer, *step)
    else:
        out = compute_resident(layer, experts, *step)
    return out if experts.combine is None else experts.combine(out)


def move_but_experts(model: nn.Module, device: torch.device) -> None:
    """Move a model to `device`, but for the weights of experts of transformers' interface."""
    kept = {id(experts.module): experts.names for experts in experts_layers(model)}
    for module in model.modules():
        names = kept.get(id(module), ())
        weights = {name: module._parameters.pop(name) for name in names}
        module._apply(lambda tensor: tensor.to(device), recurse=False)
        module._parameters.update(weights)
