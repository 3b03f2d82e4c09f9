"""Indexers of sparse attention (DSA): what they make of a token, in the families that are known.

An indexer of transformers scores and selects within its own forward pass, over a cache of its own.
`bind_indexers` has it hand over what it makes of the step's tokens instead: the model passes that
on to the attention function, which knows where earlier keys are.

Source: DeepSeek-V3.2-Exp, section 2.1, equation 1.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from hotset.cost.attention import Indexer
from hotset.cost.hot_set import guesses_between
from hotset.errors import ModelError

# `[1, T, H, P]` and the cosines and sines of its positions, `[1, T, 1, P]` -> the same, rotated.
Rotate: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Guess(NamedTuple):
    """What the next indexer makes of the input of the layer before it; T = the first tokens.

    Attributes:
        query: `[1, T, H_i, D]`, see `Index`.
        weights: `[1, T, H_i]` float32, likewise.
    """

    query: torch.Tensor
    weights: torch.Tensor


class Index(NamedTuple):
    """What an indexer makes of a step's tokens; T tokens, H_i heads, D wide.

    A token scores an earlier one by `sum_h weights_h * relu(query_h . key)`, with its own queries
    and weights and the key of the earlier one.

    Attributes:
        query: `[1, T, H_i, D]`.
        key: `[1, T, D]`.
        weights: `[1, T, H_i]` float32, with all scales in them.
        seats: `[T]`, see `Inputs`; what attention adds, None before.
        guess: of what the next layer with an indexer will select; None where none is made.
    """

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor
    seats: torch.Tensor | None = None
    guess: Guess | None = None


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
        indexer.next_layer = None


def bind_guesses(model: PreTrainedModel, most_tokens: int | None) -> None:
    """Have indexers of a bound model add a `Guess` to their `Index`.

    Not the last one, nor one behind which no experts compute: see `guesses_between`.

    Args:
        model: whose layers are guessed for; one without indexers stays as it is.
        most_tokens: the first of a step that are guessed for; None has no indexer guess.

    Raises:
        ModelError: its layers are not built as those of the families known; none guesses.
    """
    for indexer in indexers(model):
        indexer.next_layer = None
    if most_tokens is None:
        return
    layers = model.get_decoder().layers
    with_experts = [hasattr(layer.mlp, "experts") for layer in layers]
    selecting = [i for i, layer in enumerate(layers) if hasattr(layer.self_attn.indexer, "wq_b")]
    pairs = [
        pair
        for pair in pairwise(selecting)
        if guesses_between(with_experts[slice(*pair)], any(with_experts))
    ]
    try:
        ahead = {i: NextLayer(layers[i], layers[other], most_tokens) for i, other in pairs}
    except AttributeError as error:
        raise ModelError(
            f"the layers of {type(model).__name__} are built otherwise than was expected "
            f"({error}), so that no selection can be guessed; give row_prefetch 1 or less"
        ) from error
    for i, one in ahead.items():
        layers[i].self_attn.indexer.next_layer = one


class NextLayer:
    """The next layer that selects, which is asked about the input of one before it.

    The residual stream changes little from layer to layer, so most of the answer is right. What
    an indexer is given is that stream as its own layer norms it: the weight of that norm is
    exchanged for the next layer's.

    Args:
        here: a decoder layer with an indexer.
        there: the next one.
        most_tokens: the first of a step that are asked about.

    Attributes:
        indexer: of the next layer.
    """

    def __init__(self, here: Any, there: Any, most_tokens: int) -> None:
        self.indexer: Any = there.self_attn.indexer
        self._attention, self._most_tokens = there.self_attn, most_tokens
        for name in ("q_a_proj", "q_a_layernorm"):
            getattr(self._attention, name)
        norm, other = (layer.input_layernorm.weight.detach() for layer in (here, there))
        ratio = other.float() / norm.float()
        self._ratio = torch.where(norm == 0, 0.0, ratio).to(norm.dtype)

    def inputs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What its indexer is given, `[1, T, ...]`, for the normed input of the layer `here`."""
        hidden = hidden[:, : self._most_tokens] * self._ratio
        attention = self._attention
        return hidden, attention.q_a_layernorm(attention.q_a_proj(hidden))


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

    def turned(each: torch.Tensor) -> torch.Tensor:  # [1, T, H_i or 1, D]
        num_tokens = each.shape[1]
        cosines, sines = cos[:, :num_tokens], sin[:, :num_tokens]
        if rotates_last:
            kept, last = each[..., :-rotary], each[..., -rotary:]
            return torch.cat([kept, rotate(last, cosines, sines)], dim=-1)
        first, kept = each[..., :rotary], each[..., rotary:]
        return torch.cat([rotate(first, cosines, sines), kept], dim=-1)

    norm = indexer.k_norm  # of some families in float32
    key = norm(indexer.wk(hidden).to(norm.weight.dtype)).to(hidden.dtype).unsqueeze(2)
    query, weights = turned(_queries(indexer, query_residual)), _weights(indexer, hidden)
    guess = None
    if (ahead := indexer.next_layer) is not None:
        theirs, residual = ahead.inputs(hidden)
        query_ahead = turned(_queries(ahead.indexer, residual))
        guess = Guess(query_ahead, _weights(ahead.indexer, theirs))
    return Index(query, turned(key).squeeze(2), weights, guess=guess)


def _queries(indexer: Any, residual: torch.Tensor) -> torch.Tensor:
    queries: torch.Tensor = indexer.wq_b(residual).unflatten(-1, (-1, indexer.head_dim))
    return queries


def _weights(indexer: Any, hidden: torch.Tensor) -> torch.Tensor:
    projection = indexer.weights_proj  # of some models in float32
    weights = projection(hidden.to(projection.weight.dtype)).float()
    scaled: torch.Tensor = weights * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    return scaled


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
