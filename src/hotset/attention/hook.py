"""Paged attention behind transformers' attention interface.

`register` makes one function known to transformers under `IMPLEMENTATION`. The object that does
the work travels with each forward call as the keyword argument `hotset`; nothing is global.
"""

import functools
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from hotset.attention.backend import StepAttention
from hotset.attention.latent import latent_weights
from hotset.attention.probe import ProbeAttention
from hotset.attention.sparse.indexer import Index, indexer_of
from hotset.attention.spec import LayerAttention
from hotset.cost.cache_spec import KeysValues, StoredSpec
from hotset.errors import ModelError

IMPLEMENTATION = "hotset"

# Keyword arguments that transformers passes along and that do not change the result here:
# training-only, outputs that are not asked for, or positions that are in the keys already.
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
    indices: Index | None = None,
    hotset: StepAttention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    name = type(module).__name__
    if hotset is None:
        raise ModelError(f"{name} does not pass keyword arguments to its attention: not supported")
    unknown = [
        k
        for k, v in kwargs.items()
        if v is not None and k not in _NEUTRAL_ARGUMENTS and v is not hotset
    ]
    # Sparse attention is given a mask that says nothing: see `mask_arguments`.
    if unknown or (attention_mask is not None and indices is None):
        what = ", ".join(unknown) or "attention_mask"
        raise ModelError(f"{name} asks its attention for {what}: not supported")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ModelError(f"{name} is not causal: not supported")
    layer = module.layer_idx
    assert isinstance(layer, int)
    if isinstance(hotset, ProbeAttention):  # all other steps go by what it noted
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        cache: StoredSpec = KeysValues(key.shape[1], key.shape[-1], value.shape[-1], sliding_window)
        weights = latent_weights(module)
        if weights is not None:
            if sliding_window is not None or softcap is not None:
                raise ModelError(
                    f"{name} attends to latents with a window or softcap: not supported"
                )
            cache = weights.spec(rope_dim=key.shape[-1])
        indexer = None if indices is None else indexer_of(module, indices)
        if indexer is not None and weights is None:
            raise ModelError(f"{name} selects keys and values, not latents: not supported")
        asked = LayerAttention(
            cache, query.shape[1], scaling, softcap, query.dtype, s_aux, weights, indexer
        )
        hotset.note(layer, asked)
    output = hotset.attend(layer, query[0], key[0], value[0], indices)
    return output.unsqueeze(0), None
