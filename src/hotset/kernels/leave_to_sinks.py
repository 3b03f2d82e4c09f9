"""What attention leaves to sinks: logits that take part in the softmax and add nothing."""

import torch
import triton
import triton.language as tl

_ROWS = 16
_LN2 = 0.6931471805599453


@triton.jit(do_not_specialize=["num_rows", "scale"])  # type: ignore[untyped-decorator]
def _leave_to_sinks(  # type: ignore[no-untyped-def]
    output,
    sums,
    sinks,
    target,
    num_rows,
    scale,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LN2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    own = tl.load(sums + row, mask=is_row, other=0.0) * LN2
    sink = tl.load(sinks + row % NUM_HEADS, mask=is_row, other=0.0).to(tl.float32)
    share = tl.sigmoid(own - sink) * scale
    i = tl.arange(0, WIDTH)
    places = row[:, None] * DIM + i[None, :]
    inside = is_row[:, None] & (i < DIM)[None, :]
    values = tl.load(output + places, mask=inside).to(tl.float32) * share[:, None]
    tl.store(target + places, values.to(target.dtype.element_ty), mask=inside)


def leave_to_sinks(
    output: torch.Tensor,
    sums: torch.Tensor,
    sinks: torch.Tensor,
    target: torch.Tensor,
    *,
    scale: float = 1.0,
) -> None:
    """Attention with sinks, of attention without them.

    Args:
        output: `[T, H, D]`, contiguous: without sinks.
        sums: `[T, H]` float32, contiguous: the base-2 logarithm of the sum of what scores were
            raised to, finite.
        sinks: `[H]` floats: the logit of each head, by the natural logarithm.
        target: as `output`, or the same: times what the softmax leaves to tokens, and `scale`.
            Mutated.
        scale: see above.

    Cost: each value read and written once, in one launch.
    Reference: `tests/kernels/test_leave_to_sinks.py`.
    """
    num_tokens, num_heads, dim = output.shape
    num_rows = num_tokens * num_heads
    if not num_rows:
        return
    _leave_to_sinks[(triton.cdiv(num_rows, _ROWS),)](
        output,
        sums,
        sinks,
        target,
        num_rows,
        scale,
        NUM_HEADS=num_heads,
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        ROWS=_ROWS,
        LN2=_LN2,
    )
