"""Mamba-1's selective scan over states in their slots: of one token each, and of longer texts.

Tokens come one after another in both: what is computed does not depend on how a text is cut.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hotset.kernels.decode_state import softplus
from hotset.kernels.state_inputs import Mamba1Tokens, RowTable, StepTables
from hotset.sequence import NO_SEQUENCE

# Numbers of a state that one program has in registers: where each token has programs of its own,
# and where one warp goes through a text.
_DECODE_NUMBERS, _SCAN_NUMBERS = 2048, 512
_PART = 16  # tokens that are loaded before the output of the first is stored


@triton.jit  # type: ignore[untyped-decorator]
def _advance(  # type: ignore[no-untyped-def]
    state,
    rates,
    row,
    v,
    k,
    is_value,
    is_key,
    value,
    steps,
    key,
    query,
    gate,
    skip,
    bias,
    value_stride,
    steps_stride,
    key_stride,
    query_stride,
    gate_stride,
    HAS_GATE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """The `[TILE, WIDTH]` state after the token at `row`, and its `[TILE]` output.

    Where there is no token, no value and no key is one: the state stays.
    """
    new = tl.load(value + row * value_stride + v, mask=is_value, other=0.0).to(tl.float32)
    step = tl.load(steps + row * steps_stride + v, mask=is_value, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias + v, mask=is_value, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(is_value, step, 0.0)
    x = tl.load(key + row * key_stride + k, mask=is_key, other=0.0).to(tl.float32)
    q = tl.load(query + row * query_stride + k, mask=is_key, other=0.0).to(tl.float32)
    state = state * tl.exp(step[:, None] * rates) + (step * new)[:, None] * x[None, :]
    found = tl.sum(state * q[None, :], 1)
    if HAS_SKIP:
        found += tl.load(skip + v, mask=is_value, other=0.0).to(tl.float32) * new
    if HAS_GATE:
        z = tl.load(gate + row * gate_stride + v, mask=is_value, other=0.0).to(tl.float32)
        found *= z / (1.0 + tl.exp(-z))
    return state, found


@triton.jit  # type: ignore[untyped-decorator]
def _selective_decode(  # type: ignore[no-untyped-def]
    rate,
    value,
    steps,
    key,
    query,
    gate,
    skip,
    bias,
    value_stride,
    steps_stride,
    key_stride,
    query_stride,
    gate_stride,
    output,
    pool,
    reads,
    writes,
    SLOT: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    NO_SEQUENCE: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    v, k = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    is_value, is_key = v < VALUES, k < KEYS
    write = tl.load(writes + row).to(tl.int64)
    target = output + row * VALUES + v
    if write == NO_SEQUENCE:
        tl.store(target, tl.zeros([TILE], tl.float32), mask=is_value)
    if write >= 0:
        inner, inside = v[:, None] * KEYS + k[None, :], is_value[:, None] & is_key[None, :]
        read = tl.load(reads + row).to(tl.int64)
        state = tl.load(pool + read * SLOT + inner, mask=inside, other=0.0)
        rates = tl.load(rate + inner, mask=inside, other=0.0)
        state, found = _advance(
            state,
            rates,
            row,
            v,
            k,
            is_value,
            is_key,
            value,
            steps,
            key,
            query,
            gate,
            skip,
            bias,
            value_stride,
            steps_stride,
            key_stride,
            query_stride,
            gate_stride,
            HAS_GATE,
            HAS_SKIP,
            HAS_BIAS,
            SOFTPLUS,
        )
        tl.store(target, found, mask=is_value)
        tl.store(pool + write * SLOT + inner, state, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _selective_scan(  # type: ignore[no-untyped-def]
    rate,
    value,
    steps,
    key,
    query,
    gate,
    skip,
    bias,
    value_stride,
    steps_stride,
    key_stride,
    query_stride,
    gate_stride,
    output,
    pool,
    starts,
    lengths,
    writes,
    reads,
    firsts,
    ends,
    SLOT: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PART: tl.constexpr,
):
    sequence = tl.program_id(1)
    first, end = tl.load(firsts + sequence), tl.load(ends + sequence)
    if first < end:
        v, k = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
        p = tl.arange(0, PART)
        is_value, is_key = v < VALUES, k < KEYS
        inner, inside = v[:, None] * KEYS + k[None, :], is_value[:, None] & is_key[None, :]
        read = tl.load(reads + sequence).to(tl.int64)
        state = tl.load(pool + read * SLOT + inner, mask=inside, other=0.0)
        tl.debug_barrier()  # the same slot may be written
        rates = tl.load(rate + inner, mask=inside, other=0.0)
        for chunk in range(first, end):
            start, length = tl.load(starts + chunk).to(tl.int64), tl.load(lengths + chunk)
            for part in range(0, length, PART):
                # Stored together: loads do not go before a store that precedes them.
                founds = tl.zeros([TILE, PART], tl.float32)
                for i in tl.static_range(PART):
                    is_here = part + i < length
                    state, found = _advance(
                        state,
                        rates,
                        start + part + i,
                        v,
                        k,
                        v < tl.where(is_here, VALUES, 0),
                        k < tl.where(is_here, KEYS, 0),
                        value,
                        steps,
                        key,
                        query,
                        gate,
                        skip,
                        bias,
                        value_stride,
                        steps_stride,
                        key_stride,
                        query_stride,
                        gate_stride,
                        HAS_GATE,
                        HAS_SKIP,
                        HAS_BIAS,
                        SOFTPLUS,
                    )
                    founds = tl.where((p == i)[None, :], found[:, None], founds)
                target = output + (start + part + p)[None, :] * VALUES + v[:, None]
                is_found = is_value[:, None] & (part + p < length)[None, :]
                tl.store(target, founds, mask=is_found)
            write = tl.load(writes + chunk).to(tl.int64)
            if write >= 0:
                tl.store(pool + write * SLOT + inner, state, mask=inside)


def decode_mamba1(
    tokens: Mamba1Tokens, output: torch.Tensor, pool: torch.Tensor, rows: RowTable
) -> None:
    """Take sequences of one token through Mamba-1; see `decode_state.decode_delta`.

    Args:
        tokens: of the step.
        output: `[T, 1, V]` float32, contiguous. Mutated.
        pool: `[N, 1, V, K]` float32, contiguous but for the slot. Mutated.
        rows: of the first tokens of the step, the slots that they read and write.

    Cost: each state read and written once, bound by bandwidth.
    Reference: `attention.scans.Mamba1.decode`, equal up to rounding.
    """
    sizes = _sizes(tokens, pool, _DECODE_NUMBERS)
    grid = (triton.cdiv(sizes["VALUES"], sizes["TILE"]), len(rows.writes))
    _selective_decode[grid](
        *_inputs(tokens),
        output,
        pool,
        rows.reads,
        rows.writes,
        NO_SEQUENCE=NO_SEQUENCE,
        **sizes,
    )


def scan_mamba1(
    tokens: Mamba1Tokens, output: torch.Tensor, pool: torch.Tensor, tables: StepTables
) -> None:
    """Take the longer sequences of a step through Mamba-1, token by token in one launch.

    Rows of sequences of one token are left alone. Nothing is asked of the host.

    Args:
        tokens: of the step.
        output: `[T, 1, V]` float32, contiguous. Mutated.
        pool: `[N, 1, V, K]` float32, contiguous but for the slot. Mutated.
        tables: the sequences' chunks, and the slots that they read and write.

    Cost: each token read and written once; bound by the latency of a token's few operations.
    Reference: `attention.scans.Mamba1.chunk`, equal up to rounding.
    Source: Gu and Dao, "Mamba", 2023, section 3.3.2: the state does not leave the registers.
    """
    sizes = _sizes(tokens, pool, _SCAN_NUMBERS)
    grid = (triton.cdiv(sizes["VALUES"], sizes["TILE"]), len(tables.sequences.reads))
    _selective_scan[grid](
        *_inputs(tokens),
        output,
        pool,
        *tables.chunks,
        *tables.sequences,
        PART=_PART,
        num_warps=1,
        **sizes,
    )


def _inputs(tokens: Mamba1Tokens) -> tuple[Any, ...]:
    """What both kernels are given of tokens; what there is none of is not read."""
    value, step, rate, key, query = (
        tokens.value,
        tokens.step,
        tokens.rate,
        tokens.key,
        tokens.query,
    )
    gate = value if tokens.gate is None else tokens.gate
    skip, bias = (rate if each is None else each for each in (tokens.skip, tokens.bias))
    strides = (each.stride(0) for each in (value, step, key, query, gate))
    return (rate, value, step, key, query, gate, skip, bias, *strides)


def _sizes(tokens: Mamba1Tokens, pool: torch.Tensor, most_numbers: int) -> dict[str, Any]:
    """Constants of a launch; programs have at most `most_numbers` of a state each."""
    _, _, values, keys = pool.shape
    assert pool[0].is_contiguous() and tokens.rate.is_contiguous()
    width = triton.next_power_of_2(keys)
    return {
        "SLOT": pool.stride(0),
        "VALUES": values,
        "KEYS": keys,
        "TILE": min(triton.next_power_of_2(values), max(1, most_numbers // width)),
        "WIDTH": width,
        "HAS_GATE": tokens.gate is not None,
        "HAS_SKIP": tokens.skip is not None,
        "HAS_BIAS": tokens.bias is not None,
        "SOFTPLUS": tokens.is_softplus,
    }
