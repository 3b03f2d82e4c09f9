"""One token of many sequences through a layer's recurrence, over states in their slots."""

import torch
import triton
import triton.language as tl

from hotset.kernels.state_inputs import DeltaTokens, Mamba2Tokens, RowTable
from hotset.sequence import NO_SEQUENCE

_TILE_NUMBERS = 4096  # of a state, that one program has in registers


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    """`log(1 + exp(x))`, also where that is much less than 1 (Kahan's form of log1p)."""
    small = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + small
    rest = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    found = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / rest))
    return tl.where(x > 20.0, x, found)


@triton.jit  # type: ignore[untyped-decorator]
def time_step(steps, bias, at, head, low, high, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The time step at `at`, in float32, with its bias, softplus and bounds."""
    step = tl.load(steps + at).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias + head).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    return tl.minimum(tl.maximum(step, low), high)


@triton.jit  # type: ignore[untyped-decorator]
def _delta(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    decay,
    beta,
    output,
    pool,
    reads,
    writes,
    query_stride,
    key_stride,
    value_stride,
    decay_stride,
    beta_stride,
    scale,
    SLOT: tl.constexpr,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALISES: tl.constexpr,
    PER_KEY: tl.constexpr,
    NO_SEQUENCE: tl.constexpr,
):
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    v, k = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    write = tl.load(writes + row).to(tl.int64)
    target = output + (row * HEADS + head) * VALUES + v
    if write == NO_SEQUENCE:
        tl.store(target, tl.zeros([TILE], tl.float32), mask=v < VALUES)
    if write >= 0:
        inner = head * VALUES * KEYS + v[:, None] * KEYS + k[None, :]
        inside = (v < VALUES)[:, None] & (k < KEYS)[None, :]
        read = tl.load(reads + row).to(tl.int64)
        state = tl.load(pool + read * SLOT + inner, mask=inside, other=0.0)
        source = head // REPEATS * KEYS + k
        q = tl.load(query + row * query_stride + source, mask=k < KEYS, other=0.0).to(tl.float32)
        x = tl.load(key + row * key_stride + source, mask=k < KEYS, other=0.0).to(tl.float32)
        new = tl.load(value + row * value_stride + head * VALUES + v, mask=v < VALUES, other=0.0)
        if NORMALISES:
            q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
            x *= tl.rsqrt(tl.sum(x * x, 0) + 1e-6)
        q *= scale
        if PER_KEY:
            place = row * decay_stride + head * KEYS + k
            gone = tl.load(decay + place, mask=k < KEYS, other=0.0).to(tl.float32)
            state *= tl.exp(gone)[None, :]
        else:
            state *= tl.exp(tl.load(decay + row * decay_stride + head).to(tl.float32))
        known = tl.sum(state * x[None, :], 1)
        change = new.to(tl.float32) - known
        change *= tl.load(beta + row * beta_stride + head).to(tl.float32)
        state += change[:, None] * x[None, :]
        tl.store(target, tl.sum(state * q[None, :], 1), mask=v < VALUES)
        tl.store(pool + write * SLOT + inner, state, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _mamba2(  # type: ignore[no-untyped-def]
    value,
    steps,
    rate,
    key,
    query,
    skip,
    bias,
    output,
    pool,
    reads,
    writes,
    value_stride,
    steps_stride,
    key_stride,
    query_stride,
    low,
    high,
    SLOT: tl.constexpr,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    NO_SEQUENCE: tl.constexpr,
):
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    v, k = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    write = tl.load(writes + row).to(tl.int64)
    target = output + (row * HEADS + head) * VALUES + v
    if write == NO_SEQUENCE:
        tl.store(target, tl.zeros([TILE], tl.float32), mask=v < VALUES)
    if write >= 0:
        inner = head * VALUES * KEYS + v[:, None] * KEYS + k[None, :]
        inside = (v < VALUES)[:, None] & (k < KEYS)[None, :]
        read = tl.load(reads + row).to(tl.int64)
        state = tl.load(pool + read * SLOT + inner, mask=inside, other=0.0)
        source = head // REPEATS * KEYS + k
        q = tl.load(query + row * query_stride + source, mask=k < KEYS, other=0.0).to(tl.float32)
        x = tl.load(key + row * key_stride + source, mask=k < KEYS, other=0.0).to(tl.float32)
        new = tl.load(value + row * value_stride + head * VALUES + v, mask=v < VALUES, other=0.0)
        new = new.to(tl.float32)
        step = time_step(
            steps, bias, row * steps_stride + head, head, low, high, HAS_BIAS, SOFTPLUS
        )
        state *= tl.exp(step * tl.load(rate + head).to(tl.float32))
        state += (new * step)[:, None] * x[None, :]
        found = tl.sum(state * q[None, :], 1)
        if HAS_SKIP:
            found += tl.load(skip + head).to(tl.float32) * new
        tl.store(target, found, mask=v < VALUES)
        tl.store(pool + write * SLOT + inner, state, mask=inside)


def decode_delta(
    tokens: DeltaTokens, output: torch.Tensor, pool: torch.Tensor, rows: RowTable
) -> None:
    """Take sequences of one token through the gated delta rule, from one slot to another or itself.

    Rows of no sequence have an output of zeros; those of longer sequences are left alone. Nothing
    is asked of the host.

    Args:
        tokens: of the step.
        output: `[T, H, V]`, contiguous. Mutated.
        pool: `[N, H, V, K]` float32, contiguous but for the slot. Mutated.
        rows: of the first tokens of the step, the slots that they read and write.

    Cost: each state read and written once, bound by bandwidth.
    Reference: `attention.scans.GatedDelta.decode`, equal up to rounding.
    """
    sizes = _sizes(tokens.key, pool)
    _delta[_grid(sizes, rows)](
        tokens.query,
        tokens.key,
        tokens.value,
        tokens.decay,
        tokens.beta,
        output,
        pool,
        rows.reads,
        rows.writes,
        tokens.query.stride(0),
        tokens.key.stride(0),
        tokens.value.stride(0),
        tokens.decay.stride(0),
        tokens.beta.stride(0),
        tokens.key.shape[2] ** -0.5,
        NORMALISES=tokens.normalises,
        PER_KEY=tokens.decay.dim() == 3,
        **sizes,
    )


def decode_mamba2(
    tokens: Mamba2Tokens, output: torch.Tensor, pool: torch.Tensor, rows: RowTable
) -> None:
    """Take sequences of one token through Mamba-2; see `decode_delta`.

    Reference: `attention.scans.Mamba2.decode`, equal up to rounding.
    """
    sizes = _sizes(tokens.key, pool)
    _mamba2[_grid(sizes, rows)](
        tokens.value,
        tokens.step,
        tokens.rate,
        tokens.key,
        tokens.query,
        tokens.rate if tokens.skip is None else tokens.skip,
        tokens.rate if tokens.bias is None else tokens.bias,
        output,
        pool,
        rows.reads,
        rows.writes,
        tokens.value.stride(0),
        tokens.step.stride(0),
        tokens.key.stride(0),
        tokens.query.stride(0),
        *map(float, tokens.bounds),
        HAS_SKIP=tokens.skip is not None,
        HAS_BIAS=tokens.bias is not None,
        SOFTPLUS=tokens.is_softplus,
        **sizes,
    )


def _grid(sizes: dict[str, int], rows: RowTable) -> tuple[int, int, int]:
    return (triton.cdiv(sizes["VALUES"], sizes["TILE"]), sizes["HEADS"], len(rows.writes))


def _sizes(key: torch.Tensor, pool: torch.Tensor) -> dict[str, int]:
    """Constants of a launch. Strides are among them, so that 16 bytes are loaded at a time."""
    _, heads, values, keys = pool.shape
    assert pool[0].is_contiguous()
    width = triton.next_power_of_2(keys)
    tile = min(triton.next_power_of_2(values), max(1, _TILE_NUMBERS // width))
    return {
        "SLOT": pool.stride(0),
        "HEADS": heads,
        "REPEATS": heads // key.shape[1],
        "VALUES": values,
        "KEYS": keys,
        "TILE": tile,
        "WIDTH": width,
        "NO_SEQUENCE": NO_SEQUENCE,
    }
