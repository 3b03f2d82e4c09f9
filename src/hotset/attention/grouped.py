"""Attention of query heads that share key heads, by PyTorch's operations."""

import torch
from torch.nn import functional


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
        softcap: see `LayerAttention`.
        sinks: `[H]` or None; see `LayerAttention`.

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
