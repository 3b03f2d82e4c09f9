"""Recurrences over random tokens, whose decay is slow."""

import inspect

import torch
from transformers.models.bamba import modeling_bamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from hotset.attention.scans import GatedDelta, Mamba1, Mamba2

HEADS, GROUPS, VALUES, KEYS = 4, 2, 8, 16


def gated_delta(
    num_tokens: int,
    *,
    heads: int = HEADS,
    groups: int = GROUPS,
    values: int = VALUES,
    keys: int = KEYS,
) -> GatedDelta:
    """The gated delta rule over `num_tokens`."""
    original = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    query, key = torch.randn(2, num_tokens, groups, keys)
    value = torch.randn(num_tokens, heads, values)
    decay = -torch.rand(num_tokens, heads) / 20
    beta = torch.rand(num_tokens, heads)
    return GatedDelta(query, key, value, decay, beta, True, original)


def kimi_delta(
    num_tokens: int,
    *,
    heads: int = HEADS,
    groups: int = HEADS,
    values: int = VALUES,
    keys: int = KEYS,
) -> GatedDelta:
    """Kimi Delta Attention over `num_tokens`: the decays of some keys are fast."""
    original = inspect.unwrap(modeling_kimi_linear.chunk_kimi_delta_attention)
    query, key = torch.randn(2, num_tokens, heads, keys)
    value = torch.randn(num_tokens, heads, values)
    decay = -torch.rand(num_tokens, heads, keys) / 20
    decay[..., ::5] *= 100
    beta = torch.rand(num_tokens, heads)
    return GatedDelta(query, key, value, decay, beta, True, original)


def mamba2(
    num_tokens: int,
    *,
    heads: int = HEADS,
    groups: int = GROUPS,
    values: int = VALUES,
    keys: int = KEYS,
) -> Mamba2:
    """Mamba-2 over `num_tokens`."""
    original = inspect.unwrap(modeling_bamba.mamba2_chunk_scan)
    key, query = torch.randn(2, num_tokens, groups, keys)
    return Mamba2(
        torch.randn(num_tokens, heads, values),
        torch.randn(num_tokens, heads),
        -torch.rand(heads) / 20,
        key,
        query,
        torch.randn(heads),
        torch.randn(heads),
        is_softplus=True,
        bounds=(0.1, 2.0),
        original=original,
    )


def mamba1(
    num_tokens: int,
    *,
    heads: int = HEADS,
    groups: int = GROUPS,
    values: int = VALUES,
    keys: int = KEYS,
) -> Mamba1:
    """Mamba-1 over `num_tokens`: it has no heads."""
    value, step, gate = torch.randn(3, num_tokens, values)
    key, query = torch.randn(2, num_tokens, keys)
    rate = -torch.rand(values, keys) / 20
    skip, bias = torch.randn(2, values)
    return Mamba1(value, step, rate, key, query, gate, skip, bias, is_softplus=True)
