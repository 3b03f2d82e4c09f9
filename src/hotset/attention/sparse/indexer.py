"""Indexers of sparse attention (DSA): what they make of a token, in the families that are known.

An indexer of transformers scores and selects within its own forward pass, over a cache of its own.
`bind_indexers` has it hand over what it makes of the step's tokens instead: the model passes that
on to the attention function, which knows where earlier keys are.

Source: DeepSeek-V3.2-Exp, section 2.1, equation 1.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from hotset.cost.attention import Indexer
from hotset.errors import ModelError

# `[1, T, H, P]` and the cosines and sines of its positions, `[1, T, 1, P]` -> the same, rotated.
Rotate: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Index(NamedTuple):
    """What an indexer makes of a step's tokens; T tokens, H_i heads, D wide.

    A token scores an earlier one by `sum_h weights_h * relu(query_h . key)`, with its own queries
    and weights and the key of the earlier one.

    Attributes:
        query: `[1, T, H_i, D]`.
        key: `[1, T, D]`.
        weights: `[1, T, H_i]` float32, with all scales in them.
        seats: `[T]`, see `Inputs`; what attention adds, None before.
    """

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor
    seats: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class IndexerForm:
    """In what the indexers of families differ.

    Attributes:
        is_interleaved: whether a rotation turns neighbouring values, not values half a width apart.
        rotates_last: whether the last values of a head are rotated, not the first.
    """

    is_interleaved: bool
    rotates_last: bool


FORMS = {
    "deepseek_v32": IndexerForm(is_interleaved=False, rotates_last=False),
    "glm_moe_dsa": IndexerForm(is_interleaved=True, rotates_last=False),
    "hy_v4": IndexerForm(is_interleaved=False, rotates_last=True),
}


def indexers(model: nn.Module) -> Iterator[Any]:
    """The modules of a model that choose which tokens it attends to."""
    return (module for module in model.modules() if type(module).__name__.endswith("Indexer"))


def bind_indexers(model: PreTrainedModel) -> None:
    """Have each indexer of a model return an `Index`; without effect on a model that has none.

    Raises:
        ModelError: its indexers are none of `FORMS`; nothing was changed.
    """
    found = list(indexers(model))
    if not found:
        return
    family = model.config.get_text_config().model_type
    form = FORMS.get(family)
    if form is None:
        raise ModelError(
            f"{type(model).__name__} chooses the tokens it attends to by indexers of its own "
            f"({type(found[0]).__name__}): supported are those of {', '.join(FORMS)}"
        )
    for indexer in found:
        indexer.forward = types.MethodType(_FORWARD[form], indexer)


def indexer_of(attention: Any, index: Index) -> Indexer:
    """How an attention of a bound model selects: by its own indexer, or as a layer before it."""
    _, _, num_heads, width = index.query.shape
    is_shared = getattr(attention, "indexer", None) is None
    return Indexer(attention.config.index_topk, num_heads, width, is_shared=is_shared)


def mask_arguments(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the forward pass of a bound model needs beside tokens.

    Its layers subscript their mask before they hand it on. One of four dimensions is handed on as
    it is; nothing reads this one.
    """
    if next(indexers(model), None) is None:
        return {}
    return {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)}


def _make_index(
    indexer: Any,
    hidden: torch.Tensor,
    query_residual: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    rotate: Rotate,
    rotates_last: bool,
) -> Index:
    rotary = indexer.qk_rope_head_dim
    cos, sin = (each.unsqueeze(2) for each in position_embeddings)
    query = indexer.wq_b(query_residual).unflatten(-1, (-1, indexer.head_dim))
    norm = indexer.k_norm  # of some families in float32
    key = norm(indexer.wk(hidden).to(norm.weight.dtype)).to(hidden.dtype).unsqueeze(2)
    turned = []
    for each in (query, key):  # [1, T, H_i or 1, D]
        if rotates_last:
            kept, last = each[..., :-rotary], each[..., -rotary:]
            turned.append(torch.cat([kept, rotate(last, cos, sin)], dim=-1))
        else:
            first, kept = each[..., :rotary], each[..., rotary:]
            turned.append(torch.cat([rotate(first, cos, sin), kept], dim=-1))
    projection = indexer.weights_proj  # of some models in float32
    weights = projection(hidden.to(projection.weight.dtype)).float()
    scale = indexer.n_heads**-0.5 * indexer.softmax_scale
    return Index(turned[0], turned[1].squeeze(2), weights * scale)


def _turn_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


def _turn_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbours; their first values come first, of queries and keys alike."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    one, other = x[..., 0::2], x[..., 1::2]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


# One function for all layers of a family, so that they share compiled code.


def _halves_first(
    self: Any, hidden: torch.Tensor, residual: torch.Tensor, positions: Any, *_: Any, **__: Any
) -> Index:
    return _make_index(self, hidden, residual, positions, _turn_halves, False)


def _neighbours_first(
    self: Any, hidden: torch.Tensor, residual: torch.Tensor, positions: Any, *_: Any, **__: Any
) -> Index:
    return _make_index(self, hidden, residual, positions, _turn_neighbours, False)


def _halves_last(
    self: Any, hidden: torch.Tensor, residual: torch.Tensor, positions: Any, *_: Any, **__: Any
) -> Index:
    return _make_index(self, hidden, residual, positions, _turn_halves, True)


_FORWARD = {
    FORMS["deepseek_v32"]: _halves_first,
    FORMS["glm_moe_dsa"]: _neighbours_first,
    FORMS["hy_v4"]: _halves_last,
}
