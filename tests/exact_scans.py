"""Recurrences in float64, one token after another: what kernels and chunks come close to."""

import torch
from torch.nn import functional

from hotset.attention.scans import GatedDelta, Mamba1, Mamba2, Scan


def exactly(scan: Scan, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, H, V]` output of a sequence from `state`, `[H, V, K]`, and the state after it."""
    state, outputs = state.double(), []
    for row in range(len(scan.rows[0])):
        if isinstance(scan, GatedDelta):
            output, state = _delta(scan, row, state)
        elif isinstance(scan, Mamba2):
            output, state = _mamba2(scan, row, state)
        else:
            assert isinstance(scan, Mamba1)
            output, state = _mamba1(scan, row, state)
        outputs.append(output)
    return torch.stack(outputs), state


def _delta(scan: GatedDelta, row: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, decay, beta = (rows[row].double() for rows in scan.rows)
    if scan.normalises:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    repeats = len(value) // len(key)
    query, key = (x.repeat_interleave(repeats, dim=0) for x in (query, key))
    state = state * (decay if decay.ndim == 2 else decay[:, None]).exp()[:, None]
    known = torch.einsum("hvk,hk->hv", state, key)
    state = state + torch.einsum("hv,hk->hvk", (value - known) * beta[:, None], key)
    return torch.einsum("hvk,hk->hv", state, query * query.shape[-1] ** -0.5), state


def _mamba2(scan: Mamba2, row: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, step, key, query = (rows[row].double() for rows in scan.rows)
    repeats = len(value) // len(key)
    query, key = (x.repeat_interleave(repeats, dim=0) for x in (query, key))
    assert scan.bias is not None and scan.skip is not None and scan.is_softplus
    step = functional.softplus(step + scan.bias.double()).clamp(*scan.bounds)
    state = state * (step * scan.rate.double()).exp()[:, None, None]
    state = state + torch.einsum("hv,hk->hvk", value * step[:, None], key)
    output = torch.einsum("hvk,hk->hv", state, query)
    return output + scan.skip.double()[:, None] * value, state


def _mamba1(scan: Mamba1, row: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, step, key, query, gate = (rows[row].double() for rows in scan.rows)
    assert scan.bias is not None and scan.skip is not None and scan.is_softplus
    step = functional.softplus(step + scan.bias.double())
    state = state * (step[:, None] * scan.rate.double()).exp()
    state = state + torch.einsum("v,k->vk", value * step, key)
    output = torch.einsum("hvk,k->hv", state, query) + scan.skip.double() * value
    return output * functional.silu(gate), state
