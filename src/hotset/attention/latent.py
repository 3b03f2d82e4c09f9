"""Attention over latents (MLA): layers hand them over as they are, and their keys are made later.

Each attention of this kind in transformers makes keys and values of all heads in one method,
`expand_kv`, from the normed latent and the rotated key beside it, both of which all heads share.
With `hand_over_latents` that method returns its arguments, so that these are what is cached.
Projections, norms, rotary embeddings and gates stay the model's own.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C.
"""

import types
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hotset.cost.cache_spec import KeysValues, Latent
from hotset.linear.reads import mark_as_read

_CHECKED_TOKENS = 3


class LatentWeights(NamedTuple):
    """What makes keys and values of latents: a view of a layer's own weight.

    H = heads, R = width of a latent, P = width of the rotary key, D = width of a key without it,
    D_v = width of a value. A row is a latent and its rotary key, R + P numbers.

    Attributes:
        heads: `[H, D + D_v, R]`, contiguous.
        nope_dim: D.
    """

    heads: torch.Tensor
    nope_dim: int

    @property
    def keys(self) -> torch.Tensor:
        """`[H, D, R]`."""
        return self.heads[:, : self.nope_dim]

    @property
    def values(self) -> torch.Tensor:
        """`[H, D_v, R]`."""
        return self.heads[:, self.nope_dim :]

    def spec(self, rope_dim: int) -> Latent:
        """What such a layer caches, with P = `rope_dim`."""
        num_heads, head_dim, rank = self.heads.shape
        heads = KeysValues(num_heads, self.nope_dim + rope_dim, head_dim - self.nope_dim)
        return Latent(rank, rope_dim, heads)

    def expand(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[N, H, S, D + P]` and values `[N, H, S, D_v]` of `[N, S, R + P]` rows."""
        num_heads, _, rank = self.heads.shape
        heads = rows[..., :rank] @ self.heads.flatten(0, 1).T  # [N, S, H * (D + D_v)]
        heads = heads.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        rotary = rows[..., rank:].unsqueeze(1).expand(-1, num_heads, -1, -1)
        keys = torch.cat((heads[..., : self.nope_dim], rotary), dim=-1)
        return keys, heads[..., self.nope_dim :]

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """`[H, T, R + P]`, whose products with rows are those of `[H, T, D + P]` with keys."""
        latent = query[..., : self.nope_dim] @ self.keys
        return torch.cat((latent, query[..., self.nope_dim :]), dim=-1)

    def mix(self, latents: torch.Tensor) -> torch.Tensor:
        """`[H, T, D_v]` values of `[H, T, R]` weighted sums of latents."""
        return latents @ self.values.transpose(1, 2)


def hand_over_latents(model: PreTrainedModel) -> None:
    """Have each attention of `model` that is understood hand over latents, in place.

    The others go on handing over keys and values of all heads. Understood is one whose keys and
    values are those of its `kv_b_proj`, a linear layer without bias, beside the rotary key: that is
    computed for one layer of each class, but not on `meta`. The weight is read as it is from then
    on, so the layer is marked as one that is not to be replaced.
    """
    computed: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        kind = type(module)
        if not hasattr(kind, "expand_kv") or _weights(module) is None:
            continue
        if kind not in computed:
            computed[kind] = module.kv_b_proj.weight.is_meta or _expands_as_expected(module)
        if computed[kind]:
            mark_as_read(module.kv_b_proj)
            # One function for all layers, so that they share compiled code.
            module.expand_kv = types.MethodType(_hand_over, module)


def latent_weights(module: nn.Module) -> LatentWeights | None:
    """The weights of an attention that hands over latents; None for any other."""
    method = module.__dict__.get("expand_kv")
    return _weights(module) if getattr(method, "__func__", None) is _hand_over else None


def _hand_over(
    self: nn.Module, latent: torch.Tensor, rotary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of keys the rotary key, `[1, 1, T, P]`, and of values the latent, `[1, 1, T, R]`."""
    return rotary, latent


def _weights(module: nn.Module) -> LatentWeights | None:
    """Views of the layer's weight; None where its sizes are not as expected."""
    layer = getattr(module, "kv_b_proj", None)
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    sizes = [getattr(module, name, None) for name in names]
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        return None
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    rank, _, nope_dim, value_dim = sizes
    num_heads, rest = divmod(layer.out_features, nope_dim + value_dim)
    if rest or layer.in_features != rank:
        return None
    heads = layer.weight.detach().view(num_heads, nope_dim + value_dim, rank)
    return LatentWeights(heads, nope_dim)


def _expands_as_expected(module: nn.Module) -> bool:
    """Whether the model's own code makes the keys and values that `LatentWeights` does."""
    weights = _weights(module)
    assert weights is not None
    rank, rope_dim = weights.heads.shape[-1], module.qk_rope_head_dim
    assert isinstance(rope_dim, int)
    numbers = torch.arange(_CHECKED_TOKENS * (rank + rope_dim), dtype=torch.float32).sin()
    rows = numbers.view(1, 1, _CHECKED_TOKENS, -1).to(weights.heads)
    with torch.inference_mode():
        expand = type(module).expand_kv  # type: ignore[attr-defined]
        theirs = expand(module, rows[..., :rank], rows[..., rank:])
        return all(map(_are_close, weights.expand(rows[0]), theirs))


def _are_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    bound = torch.finfo(one.dtype).eps ** 0.5
    return one.shape == other.shape and torch.allclose(one, other, rtol=bound, atol=bound)
