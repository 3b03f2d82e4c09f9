"""Causal convolutions of a step's tokens, which go on from the columns in slots."""

import torch
import triton
import triton.language as tl

from hotset.kernels.state_inputs import StepTables

_ROWS, _CHANNELS = 8, 128  # of one program
_CHUNKS = 16  # of a sequence that are looked at together, whether they write


@triton.jit  # type: ignore[untyped-decorator]
def _column(  # type: ignore[no-untyped-def]
    x_at, kept_at, rows, places, seen, inside, back, KERNEL: tl.constexpr
):
    """What a tap meets that is `back` tokens before: one of this step, or a column of the slot."""
    is_here = (seen >= back)[:, None]
    x = tl.load(x_at[None, :] + rows[:, None], mask=inside & is_here, other=0.0)
    places += KERNEL - 1 - back + seen
    kept = tl.load(kept_at[None, :] + places[:, None], mask=inside & ~is_here, other=0.0)
    return tl.where(is_here, x, kept)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted(weight, c, is_channel, tap, x, KERNEL: tl.constexpr):  # type: ignore[no-untyped-def]
    w = tl.load(weight + c * KERNEL + tap, mask=is_channel, other=0.0)
    return x.to(tl.float32) * w.to(tl.float32)[None, :]


# Steps of any number of tokens run the same code.
@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def]
    values,
    weight,
    bias,
    output,
    columns,
    reads,
    writes,
    before,
    num_tokens,
    num_channels,
    row_stride,
    channel_stride,
    SLOT: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_token, is_channel = t < num_tokens, c < num_channels
    inside = is_token[:, None] & is_channel[None, :]
    read = tl.load(reads + t, mask=is_token, other=0).to(tl.int64)
    write = tl.load(writes + t, mask=is_token, other=-1).to(tl.int64)
    seen = tl.load(before + t, mask=is_token, other=0)
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    if HAS_BIAS:
        found += tl.load(bias + c, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    is_near = tl.min(tl.where(is_token, seen, KERNEL), 0) < KERNEL - 1  # some meet a slot
    x_at, kept_at = values + c * channel_stride, columns + c * (KERNEL - 1)
    # Apart, as columns of slots are not laid out as tokens are: all would go by shared memory.
    if is_near:
        for tap in tl.static_range(KERNEL):
            back = KERNEL - 1 - tap
            rows = (t - back) * row_stride
            x = _column(x_at, kept_at, rows, read * SLOT, seen, inside, back, KERNEL)
            found += _weighted(weight, c, is_channel, tap, x, KERNEL)
    else:
        for tap in tl.static_range(KERNEL):
            rows = (t - (KERNEL - 1 - tap)) * row_stride
            x = tl.load(x_at[None, :] + rows[:, None], mask=inside, other=0.0)
            found += _weighted(weight, c, is_channel, tap, x, KERNEL)
    if tl.max(write, 0) >= 0:  # the sequence of one token moves on, once its columns were read
        is_kept = inside & (write >= 0)[:, None]
        for tap in tl.static_range(1, KERNEL):
            back = KERNEL - 1 - tap
            rows = (t - back) * row_stride
            x = _column(x_at, kept_at, rows, read * SLOT, seen, is_kept, back, KERNEL)
            tl.debug_barrier()
            tl.store(kept_at[None, :] + (write * SLOT + tap - 1)[:, None], x, mask=is_kept)
    if SILU:
        found = found / (1.0 + tl.exp(-found))
    tl.store(output + t[:, None] * num_channels + c[None, :], found, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _keep_columns(  # type: ignore[no-untyped-def]
    values,
    columns,
    starts,
    lengths,
    writes,
    reads,
    firsts,
    ends,
    num_channels,
    row_stride,
    channel_stride,
    SLOT: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    sequence = tl.program_id(1)
    first, end = tl.load(firsts + sequence), tl.load(ends + sequence)
    read = tl.load(reads + sequence).to(tl.int64) * SLOT
    start = tl.load(starts + first).to(tl.int64)
    # Most chunks write nothing: those are passed by several at a time.
    for few in range(first, end, CHUNKS):
        chunks = few + tl.arange(0, CHUNKS)
        slots = tl.load(writes + chunks, mask=chunks < end, other=-1)
        if tl.max(slots, 0) >= 0:
            for chunk in range(few, tl.minimum(few + CHUNKS, end)):
                write = tl.load(writes + chunk).to(tl.int64)
                if write >= 0:
                    after = tl.load(starts + chunk).to(tl.int64) + tl.load(lengths + chunk)
                    for column in tl.static_range(KERNEL - 1):
                        row = after - (KERNEL - 1) + column
                        is_here = c < tl.where(row >= start, num_channels, 0)
                        is_kept = c < tl.where(row >= start, 0, num_channels)
                        place = row * row_stride + c * channel_stride
                        here = tl.load(values + place, mask=is_here, other=0.0)
                        # Where the slot is the same, this column is behind the one written.
                        place = read + c * (KERNEL - 1) + (KERNEL - 1 + row - start)
                        kept = tl.load(columns + place, mask=is_kept, other=0.0)
                        tl.debug_barrier()
                        place = write * SLOT + c * (KERNEL - 1) + column
                        x = tl.where(is_here, here, kept)
                        tl.store(columns + place, x, mask=c < num_channels)


def convolve(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    columns: torch.Tensor,
    tables: StepTables,
    *,
    silu: bool,
) -> None:
    """Convolve each channel over the tokens of each sequence, and leave what the next step needs.

    T = tokens, C = channels, N = slots. Nothing is asked of the host.

    Args:
        values: `[C, T]`, any strides.
        weight: `[C, kernel]`, contiguous.
        bias: `[C]`; None for none.
        output: `[T, C]`, contiguous. Mutated.
        columns: `[N, C, kernel - 1]`, contiguous but for the slot, of the dtype of `values`.
            Mutated.
        tables: slots that sequences read and write, which no two of them share to write.
        silu: whether the result goes through SiLU.

    Cost: each value read and written once, from HBM; one launch, two where there are prompts.
    Reference: `attention.state_step.TorchStates.convolve`, equal up to rounding. The result for a
        token is the same in all bits, however its sequence is cut into steps.
    """
    num_channels, num_tokens = values.shape
    kernel = weight.shape[1]
    row_stride, channel_stride = values.stride(1), values.stride(0)
    assert columns[0].is_contiguous() and weight.is_contiguous()
    grid = (triton.cdiv(num_tokens, _ROWS), triton.cdiv(num_channels, _CHANNELS))
    _convolve[grid](
        values,
        weight,
        weight if bias is None else bias,
        output,
        columns,
        *tables.rows,
        num_tokens,
        num_channels,
        row_stride,
        channel_stride,
        SLOT=columns.stride(0),
        KERNEL=kernel,
        HAS_BIAS=bias is not None,
        SILU=silu,
        ROWS=_ROWS,
        WIDTH=_CHANNELS,
    )
    if num_sequences := len(tables.sequences.reads):
        _keep_columns[(triton.cdiv(num_channels, _CHANNELS), num_sequences)](
            values,
            columns,
            *tables.chunks,
            *tables.sequences,
            num_channels,
            row_stride,
            channel_stride,
            SLOT=columns.stride(0),
            KERNEL=kernel,
            WIDTH=_CHANNELS,
            CHUNKS=_CHUNKS,
        )
