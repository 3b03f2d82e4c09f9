"""Texts through a layer's recurrence, in chunks of 64 tokens, over states in their slots.

Two launches, three where each key has a decay of its own. What the tokens of a chunk are to each
other is computed for all chunks at once; then each head of a sequence goes from chunk to chunk with
its state in registers. A chunk's result depends on its tokens and the state before it alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hotset.kernels.chunk_pairs import (
    load_rows,
    of_length_1,
    pair_delta,
    pair_kimi,
    pair_mamba2,
    sum_decays,
)
from hotset.kernels.state_inputs import DeltaTokens, Mamba2Tokens, StepTables

CHUNK = 64  # tokens
_PART = 16  # rows of a chunk that are solved one after another


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
    PER_KEY: tl.constexpr,
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
            if PER_KEY:
                gone = load_rows(sums, start, length, HEADS * KEYS, head * KEYS, KEYS, WIDTH)
            else:
                gone = tl.load(sums + rows * HEADS + head, mask=inside, other=0.0)[:, None]
            last = tl.sum(tl.where((i == length - 1)[:, None], gone, 0.0), 0)
            # Keys are done with before queries are loaded: there are registers for one of them.
            x = load_rows(key, start, length, key_stride, at, KEYS, WIDTH)
            if NORMALISES:
                x = of_length_1(x)
            places = rows[:, None] * value_stride + head * VALUES + v[None, :]
            is_value = inside[:, None] & (v < VALUES)[None, :]
            new = tl.load(value + places, mask=is_value, other=0.0).to(tl.float32)
            written, place = new, (rows * HEADS + head)[:, None] * 64 + i[None, :]
            if IS_DELTA:
                solve = tl.load(solved + place, mask=inside[:, None], other=0.0)
                known = tl.dot(x * tl.exp(gone), state, input_precision=PRECISION)
                new = tl.dot(solve, new - known, input_precision=PRECISION)
                written = new
            else:
                written *= tl.load(weights + rows * HEADS + head, mask=inside, other=0.0)[:, None]
            x *= tl.exp(last[None, :] - gone)
            change = tl.dot(tl.trans(x), written, input_precision=PRECISION)
            q = load_rows(query, start, length, query_stride, at, KEYS, WIDTH)
            if NORMALISES:
                q = of_length_1(q)
            q *= scale * tl.exp(gone)
            found = tl.dot(q, state, input_precision=PRECISION)
            pairs = tl.load(mix + place, mask=inside[:, None], other=0.0)
            found += tl.dot(pairs, new, input_precision=PRECISION)
            if HAS_SKIP:
                found += tl.load(skip + head).to(tl.float32) * new
            place = (rows * HEADS + head)[:, None] * VALUES + v[None, :]
            tl.store(output + place, found, mask=is_value)
            state = state * tl.exp(last)[:, None] + change
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
    sizes, per_key = _sizes(tokens.key, tokens.value, pool), tokens.decay.dim() == 3
    sums = torch.empty_like(
        tokens.decay, dtype=torch.float32, memory_format=torch.contiguous_format
    )
    mix, solved = _new(output, CHUNK), _new(output, CHUNK)
    _pair(tokens, sums, mix, solved, tables, sizes)
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
        tokens.key.shape[2] ** -0.5,
        IS_DELTA=True,
        PER_KEY=per_key,
        NORMALISES=tokens.normalises,
        HAS_SKIP=False,
        num_stages=1,
        **sizes,
    )


def _pair(
    tokens: DeltaTokens,
    sums: torch.Tensor,
    mix: torch.Tensor,
    solved: torch.Tensor,
    tables: StepTables,
    sizes: dict[str, Any],
) -> None:
    """Compute what tokens of a chunk are to each other, and the sums of their decays."""
    chunks, grid = tables.chunks, (len(tables.chunks.starts), sizes["HEADS"])
    strides = (tokens.query.stride(0), tokens.key.stride(0), tokens.beta.stride(0))
    scale, rows = tokens.key.shape[2] ** -0.5, (chunks.starts, chunks.lengths)
    options = {"PART": _PART, "NORMALISES": tokens.normalises, **_of_keys(sizes)}
    given = (tokens.query, tokens.key, tokens.beta, sums, mix, solved, *rows, *strides, scale)
    if tokens.decay.dim() == 2:
        pair_delta[grid](*given, tokens.decay, tokens.decay.stride(0), **options)
        return
    widths = {name: sizes[name] for name in ("HEADS", "KEYS", "WIDTH")}
    sum_decays[grid](tokens.decay, sums, *rows, tokens.decay.stride(0), **widths)
    pair_kimi[grid](*given, **options)


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
    pair_mamba2[(len(tables.chunks.starts), sizes["HEADS"])](
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
        *map(float, tokens.bounds),
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
        PER_KEY=False,
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
