"""Texts through a layer's recurrence, in chunks of 64 tokens, over states in their slots.

Two launches. What the tokens of a chunk are to each other is computed for all chunks at once; then
each head of a sequence goes from chunk to chunk with its state in registers. A chunk's result
depends on its tokens and the state before it alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hotset.kernels.decode_state import time_step
from hotset.kernels.state_inputs import DeltaTokens, Mamba2Tokens, StepTables

CHUNK = 64  # tokens
_PART = 16  # rows of a chunk that are solved one after another


@triton.jit  # type: ignore[untyped-decorator]
def _load_rows(rows, start, length, stride, at, KEYS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """`[64, WIDTH]` float32 of a chunk's rows, zeros beyond it."""
    i, k = tl.arange(0, 64), tl.arange(0, WIDTH)
    place = (start + i)[:, None] * stride + at + k[None, :]
    inside = (i < length)[:, None] & (k < KEYS)[None, :]
    return tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _of_length_1(rows):  # type: ignore[no-untyped-def]
    return rows * tl.rsqrt(tl.sum(rows * rows, 1) + 1e-6)[:, None]


@triton.jit
def _fade(sums):  # type: ignore[no-untyped-def]
    """`[64, 64]`: what is left at a row of what a row before it, or itself, left; 0 for later."""
    i = tl.arange(0, 64)
    is_past = i[:, None] >= i[None, :]
    between = tl.where(is_past, sums[:, None] - sums[None, :], 0.0)
    return tl.where(is_past, tl.exp(between), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _inverse(lower, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of 1 + `lower`, `[64, 64]`, zero from the diagonal on.

    Row by row within parts of the diagonal, all parts at once; those are then joined by a series,
    which ends as what is left of `lower` is nilpotent.
    """
    i = tl.arange(0, 64)
    is_own = (i // PART)[:, None] == (i // PART)[None, :]
    own = tl.where(is_own, -lower, 0.0)
    for step in range(1, PART):
        is_row = (i % PART == step)[:, None] & is_own
        row = tl.sum(tl.where(is_row, own, 0.0), 0)  # of each part, side by side
        row += tl.sum(row[:, None] * own, 0)
        own = tl.where(is_row, row[None, :], own)
    own += tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    rest = tl.dot(own, tl.where(is_own, 0.0, lower), input_precision="tf32x3")
    once = tl.dot(rest, own, input_precision="tf32x3")
    even = own + tl.dot(rest, once, input_precision="tf32x3")
    return even - tl.dot(rest, even, input_precision="tf32x3")


@triton.jit  # type: ignore[untyped-decorator]
def _pair_delta(  # type: ignore[no-untyped-def]
    query,
    key,
    decay,
    beta,
    sums,
    mix,
    solved,
    starts,
    lengths,
    query_stride,
    key_stride,
    decay_stride,
    beta_stride,
    scale,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    NORMALISES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + chunk)
    if length > 0:
        start = tl.load(starts + chunk).to(tl.int64)
        i = tl.arange(0, 64)
        rows, inside = start + i, i < length
        at = head // REPEATS * KEYS
        q = _load_rows(query, start, length, query_stride, at, KEYS, WIDTH)
        x = _load_rows(key, start, length, key_stride, at, KEYS, WIDTH)
        if NORMALISES:
            q, x = _of_length_1(q), _of_length_1(x)
        q *= scale
        gone = tl.load(decay + rows * decay_stride + head, mask=inside, other=0.0)
        gone = tl.cumsum(gone.to(tl.float32), 0)
        tl.store(sums + rows * HEADS + head, gone, mask=inside)
        fade = _fade(gone)
        b = tl.load(beta + rows * beta_stride + head, mask=inside, other=0.0).to(tl.float32)
        place = (rows * HEADS + head)[:, None] * 64 + i[None, :]
        pairs = tl.dot(q, tl.trans(x), input_precision=PRECISION) * fade
        tl.store(mix + place, pairs, mask=inside[:, None])
        lower = tl.dot(x, tl.trans(x), input_precision=PRECISION) * fade * b[:, None]
        lower = tl.where(i[:, None] > i[None, :], lower, 0.0)
        found = _inverse(lower, PART) * b[None, :]
        tl.store(solved + place, found, mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _pair_mamba2(  # type: ignore[no-untyped-def]
    query,
    key,
    steps,
    rate,
    bias,
    sums,
    weights,
    mix,
    starts,
    lengths,
    query_stride,
    key_stride,
    steps_stride,
    low,
    high,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + chunk)
    if length > 0:
        start = tl.load(starts + chunk).to(tl.int64)
        i = tl.arange(0, 64)
        rows, inside = start + i, i < length
        at = head // REPEATS * KEYS
        q = _load_rows(query, start, length, query_stride, at, KEYS, WIDTH)
        x = _load_rows(key, start, length, key_stride, at, KEYS, WIDTH)
        places = tl.where(inside, rows, start) * steps_stride + head
        step = time_step(steps, bias, places, head, low, high, HAS_BIAS, SOFTPLUS)
        step = tl.where(inside, step, 0.0)
        gone = tl.cumsum(step * tl.load(rate + head).to(tl.float32), 0)
        tl.store(sums + rows * HEADS + head, gone, mask=inside)
        tl.store(weights + rows * HEADS + head, step, mask=inside)
        # Columns by the time step, so that values can be taken as they are.
        pairs = tl.dot(q, tl.trans(x), input_precision=PRECISION) * _fade(gone) * step[None, :]
        place = (rows * HEADS + head)[:, None] * 64 + i[None, :]
        tl.store(mix + place, pairs, mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _scan(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    sums,
    mix,
    solved,
    weights,
    skip,
    output,
    pool,
    starts,
    lengths,
    writes,
    reads,
    firsts,
    ends,
    query_stride,
    key_stride,
    value_stride,
    scale,
    SLOT: tl.constexpr,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_DELTA: tl.constexpr,
    NORMALISES: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, sequence = tl.program_id(1), tl.program_id(2)
    first, end = tl.load(firsts + sequence), tl.load(ends + sequence)
    if first < end:
        i, k = tl.arange(0, 64), tl.arange(0, WIDTH)
        v = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inner = head * VALUES * KEYS + v[None, :] * KEYS + k[:, None]
        is_number = (v < VALUES)[None, :] & (k < KEYS)[:, None]
        read = tl.load(reads + sequence).to(tl.int64)
        state = tl.load(pool + read * SLOT + inner, mask=is_number, other=0.0)  # keys first
        tl.debug_barrier()  # the same slot may be written
        at = head // REPEATS * KEYS
        for chunk in range(first, end):
            start, length = tl.load(starts + chunk).to(tl.int64), tl.load(lengths + chunk)
            rows, inside = start + i, i < length
            q = _load_rows(query, start, length, query_stride, at, KEYS, WIDTH)
            x = _load_rows(key, start, length, key_stride, at, KEYS, WIDTH)
            if NORMALISES:
                q, x = _of_length_1(q), _of_length_1(x)
            q *= scale
            gone = tl.load(sums + rows * HEADS + head, mask=inside, other=0.0)
            last = tl.sum(tl.where(i == length - 1, gone, 0.0), 0)
            places = rows[:, None] * value_stride + head * VALUES + v[None, :]
            is_value = inside[:, None] & (v < VALUES)[None, :]
            new = tl.load(value + places, mask=is_value, other=0.0).to(tl.float32)
            place = (rows * HEADS + head)[:, None] * 64 + i[None, :]
            if IS_DELTA:
                solve = tl.load(solved + place, mask=inside[:, None], other=0.0)
                known = tl.dot(x, state, input_precision=PRECISION)
                change = new - tl.exp(gone)[:, None] * known
                new = tl.dot(solve, change, input_precision=PRECISION)
            found = tl.exp(gone)[:, None] * tl.dot(q, state, input_precision=PRECISION)
            pairs = tl.load(mix + place, mask=inside[:, None], other=0.0)
            found += tl.dot(pairs, new, input_precision=PRECISION)
            left = tl.exp(last - gone)
            if not IS_DELTA:
                if HAS_SKIP:
                    found += tl.load(skip + head).to(tl.float32) * new
                left *= tl.load(weights + rows * HEADS + head, mask=inside, other=0.0)
            tl.store(
                output + (rows * HEADS + head)[:, None] * VALUES + v[None, :], found, mask=is_value
            )
            new *= left[:, None]
            state = state * tl.exp(last) + tl.dot(tl.trans(x), new, input_precision=PRECISION)
            write = tl.load(writes + chunk).to(tl.int64)
            if write >= 0:
                tl.store(pool + write * SLOT + inner, state, mask=is_number)


def scan_delta(
    tokens: DeltaTokens, output: torch.Tensor, pool: torch.Tensor, tables: StepTables
) -> None:
    """Take the longer sequences of a step through the gated delta rule.

    Rows of sequences of one token are left alone. Nothing is asked of the host.

    Args:
        tokens: of the step.
        output: `[T, H, V]`, contiguous. Mutated.
        pool: `[N, H, V, K]` float32, contiguous but for the slot. Mutated.
        tables: the sequences' chunks, and the slots that they read and write.

    Cost: 12 small products of matrices per chunk and head, 5 of them one chunk after another; 128
        float32 numbers per token and head are written and read.
    Reference: `attention.scans.GatedDelta.chunk`, equal up to rounding.
    Source: Yang et al., "Gated Delta Networks", 2024, section 3.3.
    """
    sizes = _sizes(tokens.key, tokens.value, pool)
    sums, mix, solved = _new(output), _new(output, CHUNK), _new(output, CHUNK)
    scale = tokens.key.shape[2] ** -0.5
    _pair_delta[(len(tables.chunks.starts), sizes["HEADS"])](
        tokens.query,
        tokens.key,
        tokens.decay,
        tokens.beta,
        sums,
        mix,
        solved,
        tables.chunks.starts,
        tables.chunks.lengths,
        tokens.query.stride(0),
        tokens.key.stride(0),
        tokens.decay.stride(0),
        tokens.beta.stride(0),
        scale,
        PART=_PART,
        NORMALISES=tokens.normalises,
        **_of_keys(sizes),
    )
    _scan[_grid(sizes, tables)](
        tokens.query,
        tokens.key,
        tokens.value,
        sums,
        mix,
        solved,
        sums,
        sums,
        output,
        pool,
        *tables.chunks,
        *tables.sequences,
        tokens.query.stride(0),
        tokens.key.stride(0),
        tokens.value.stride(0),
        scale,
        IS_DELTA=True,
        NORMALISES=tokens.normalises,
        HAS_SKIP=False,
        num_stages=1,
        **sizes,
    )


def scan_mamba2(
    tokens: Mamba2Tokens, output: torch.Tensor, pool: torch.Tensor, tables: StepTables
) -> None:
    """Take the longer sequences of a step through Mamba-2; see `scan_delta`.

    Cost: 4 small products of matrices per chunk and head, 3 of them one chunk after another; 64
        float32 numbers per token and head are written and read.
    Reference: `attention.scans.Mamba2.chunk`, equal up to rounding.
    Source: Dao and Gu, "Transformers are SSMs", 2024, section 6.
    """
    sizes = _sizes(tokens.key, tokens.value, pool)
    sums, weights, mix = _new(output), _new(output), _new(output, CHUNK)
    _pair_mamba2[(len(tables.chunks.starts), sizes["HEADS"])](
        tokens.query,
        tokens.key,
        tokens.step,
        tokens.rate,
        tokens.rate if tokens.bias is None else tokens.bias,
        sums,
        weights,
        mix,
        tables.chunks.starts,
        tables.chunks.lengths,
        tokens.query.stride(0),
        tokens.key.stride(0),
        tokens.step.stride(0),
        *tokens.bounds,
        HAS_BIAS=tokens.bias is not None,
        SOFTPLUS=tokens.is_softplus,
        **_of_keys(sizes),
    )
    _scan[_grid(sizes, tables)](
        tokens.query,
        tokens.key,
        tokens.value,
        sums,
        mix,
        sums,
        weights,
        tokens.rate if tokens.skip is None else tokens.skip,
        output,
        pool,
        *tables.chunks,
        *tables.sequences,
        tokens.query.stride(0),
        tokens.key.stride(0),
        tokens.value.stride(0),
        1.0,
        IS_DELTA=False,
        NORMALISES=False,
        HAS_SKIP=tokens.skip is not None,
        num_stages=1,
        **sizes,
    )


def _new(output: torch.Tensor, *shape: int) -> torch.Tensor:
    """float32 numbers for each token and head of `output`."""
    return output.new_empty(*output.shape[:2], *shape, dtype=torch.float32)


def _sizes(key: torch.Tensor, value: torch.Tensor, pool: torch.Tensor) -> dict[str, Any]:
    _, heads, values, keys = pool.shape
    assert pool[0].is_contiguous()
    width = max(16, triton.next_power_of_2(keys))
    return {
        "SLOT": pool.stride(0),
        "HEADS": heads,
        "REPEATS": heads // key.shape[1],
        "VALUES": values,
        "KEYS": keys,
        "TILE": min(max(16, triton.next_power_of_2(values)), 4096 // width),
        "WIDTH": width,
        # By tensor cores, in one product or in three that are as good as float32.
        "PRECISION": "tf32x3" if value.dtype == torch.float32 else "tf32",
    }


def _of_keys(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: sizes[name] for name in ("HEADS", "REPEATS", "KEYS", "WIDTH", "PRECISION")}


def _grid(sizes: dict[str, Any], tables: StepTables) -> tuple[int, int, int]:
    tiles = triton.cdiv(sizes["VALUES"], sizes["TILE"])
    return (tiles, sizes["HEADS"], len(tables.sequences.reads))
