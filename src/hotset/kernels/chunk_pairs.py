"""What the tokens of a chunk are to each other in a recurrence: of all chunks and heads at once."""

import triton
import triton.language as tl

from hotset.kernels.decode_state import time_step


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(rows, start, length, stride, at, KEYS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """`[64, WIDTH]` float32 of a chunk's rows, zeros beyond it."""
    i, k = tl.arange(0, 64), tl.arange(0, WIDTH)
    place = (start + i)[:, None] * stride + at + k[None, :]
    inside = (i < length)[:, None] & (k < KEYS)[None, :]
    return tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def of_length_1(rows):  # type: ignore[no-untyped-def]
    """The same `[64, WIDTH]` with rows of length 1."""
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
def pair_delta(  # type: ignore[no-untyped-def]
    query,
    key,
    beta,
    sums,
    mix,
    solved,
    starts,
    lengths,
    query_stride,
    key_stride,
    beta_stride,
    scale,
    decay,
    decay_stride,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    NORMALISES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`mix`, what rows add to the output of later ones, and `solved`, the values that they write.

    Both `[T, H, 64]`; `sums` is `[T, H]`, of the decays within a chunk. `solved` is for values
    less what the state before the chunk has under their keys.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + chunk)
    if length > 0:
        start = tl.load(starts + chunk).to(tl.int64)
        i = tl.arange(0, 64)
        rows, inside = start + i, i < length
        at = head // REPEATS * KEYS
        q = load_rows(query, start, length, query_stride, at, KEYS, WIDTH)
        x = load_rows(key, start, length, key_stride, at, KEYS, WIDTH)
        if NORMALISES:
            q, x = of_length_1(q), of_length_1(x)
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
def pair_mamba2(  # type: ignore[no-untyped-def]
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
    """`mix`, what rows add to the output of later ones, `[T, H, 64]`, with their time steps.

    `sums` and `weights` are `[T, H]`: of the decays within a chunk, and the time steps.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + chunk)
    if length > 0:
        start = tl.load(starts + chunk).to(tl.int64)
        i = tl.arange(0, 64)
        rows, inside = start + i, i < length
        at = head // REPEATS * KEYS
        q = load_rows(query, start, length, query_stride, at, KEYS, WIDTH)
        x = load_rows(key, start, length, key_stride, at, KEYS, WIDTH)
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
def sum_decays(  # type: ignore[no-untyped-def]
    decay,
    sums,
    starts,
    lengths,
    decay_stride,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`[T, H, K]` of decays of their own for each key: their sums within a chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + chunk)
    if length > 0:
        start = tl.load(starts + chunk).to(tl.int64)
        i, k = tl.arange(0, 64), tl.arange(0, WIDTH)
        gone = tl.cumsum(load_rows(decay, start, length, decay_stride, head * KEYS, KEYS, WIDTH), 0)
        place = ((start + i) * HEADS + head)[:, None] * KEYS + k[None, :]
        tl.store(sums + place, gone, mask=(i < length)[:, None] & (k < KEYS)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def pair_kimi(  # type: ignore[no-untyped-def]
    query,
    key,
    beta,
    sums,
    mix,
    solved,
    starts,
    lengths,
    query_stride,
    key_stride,
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
    """As `pair_delta`, with a decay for each key.

    Rows of one part of a chunk and those of parts before it meet at the part's first row: both
    decays are then below 1. Within a part they are taken key by key.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + chunk)
    if length > 0:
        start = tl.load(starts + chunk).to(tl.int64)
        i, k = tl.arange(0, 64), tl.arange(0, WIDTH)
        rows, inside = start + i, i < length
        at = head // REPEATS * KEYS
        q = load_rows(query, start, length, query_stride, at, KEYS, WIDTH)
        x = load_rows(key, start, length, key_stride, at, KEYS, WIDTH)
        if NORMALISES:
            q, x = of_length_1(q), of_length_1(x)
        q *= scale
        gone = load_rows(sums, start, length, HEADS * KEYS, head * KEYS, KEYS, WIDTH)
        pairs, lower = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
        for first in range(PART, 64, PART):
            meets = tl.sum(tl.where((i == first)[:, None], gone, 0.0), 0)[None, :]
            after = tl.where((i // PART * PART == first)[:, None], 1.0, 0.0)
            after *= tl.exp(tl.minimum(gone - meets, 0.0))
            before = tl.where((i < first)[:, None], x * tl.exp(tl.minimum(meets - gone, 0.0)), 0.0)
            pairs += tl.dot(q * after, tl.trans(before), input_precision=PRECISION)
            lower += tl.dot(x * after, tl.trans(before), input_precision=PRECISION)
        for step in range(PART):
            other = i // PART * PART + step  # a row of each row's part
            place = (start + other)[:, None] * key_stride + at + k[None, :]
            is_number = (other < length)[:, None] & (k < KEYS)[None, :]
            y = tl.load(key + place, mask=is_number, other=0.0).to(tl.float32)
            if NORMALISES:
                y = of_length_1(y)
            place = ((start + other) * HEADS + head)[:, None] * KEYS + k[None, :]
            gone_by = tl.load(sums + place, mask=is_number, other=0.0)
            y *= tl.exp(tl.minimum(gone - gone_by, 0.0))
            is_here = (i[None, :] == other[:, None]) & (i[None, :] <= i[:, None])
            pairs = tl.where(is_here, tl.sum(q * y, 1)[:, None], pairs)
            lower = tl.where(is_here, tl.sum(x * y, 1)[:, None], lower)
        b = tl.load(beta + rows * beta_stride + head, mask=inside, other=0.0).to(tl.float32)
        place = (rows * HEADS + head)[:, None] * 64 + i[None, :]
        tl.store(mix + place, pairs, mask=inside[:, None])
        lower = tl.where(i[:, None] > i[None, :], lower * b[:, None], 0.0)
        found = _inverse(lower, PART) * b[None, :]
        tl.store(solved + place, found, mask=inside[:, None])
