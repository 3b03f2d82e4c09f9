"""Joining attention over two parts of a context."""

import torch
import triton
import triton.language as tl

# Rows of a program: with one each, 131,072 of 1,024 tokens and 128 heads take longer to start than
# to read.
_ROWS = 16


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _merge_states(  # type: ignore[no-untyped-def]
    output,
    sums,
    other,
    other_sums,
    num_rows,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    one = tl.load(sums + row, mask=is_row, other=0.0)
    two = tl.load(other_sums + row, mask=is_row, other=0.0)
    largest = tl.maximum(one, two)
    weight, other_weight = tl.exp2(one - largest), tl.exp2(two - largest)
    total = weight + other_weight
    i = tl.arange(0, WIDTH)
    places = row[:, None] * VALUE_DIM + i[None, :]
    inside = is_row[:, None] & (i < VALUE_DIM)[None, :]
    a = tl.load(output + places, mask=inside).to(tl.float32)
    b = tl.load(other + places, mask=inside).to(tl.float32)
    merged = (a * weight[:, None] + b * other_weight[:, None]) / total[:, None]
    tl.store(output + places, merged.to(output.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # each warp has loaded the sums that are overwritten here
    tl.store(sums + row, largest + tl.log2(total), mask=is_row)


def merge_states(
    output: torch.Tensor, sums: torch.Tensor, other: torch.Tensor, other_sums: torch.Tensor
) -> None:
    """Attention over two parts of a context, of that over each, in place.

    Args:
        output: `[T, H, D_v]`, contiguous: over the first part. Mutated: over both.
        sums: `[T, H]` float32, contiguous: the base-2 logarithm of the sum of what scores were
            raised to, finite. Mutated.
        other: as `output`, over the second part.
        other_sums: as `sums`.

    Cost: each value read once, and `output` written, bound by bandwidth.
    Reference: `tests/kernels/test_merge_states.py`.
    Source: FlashInfer (arXiv 2501.01005), section 2.2.
    """
    num_tokens, num_heads, value_dim = output.shape
    num_rows = num_tokens * num_heads
    _merge_states[(triton.cdiv(num_rows, _ROWS),)](
        output,
        sums,
        other,
        other_sums,
        num_rows,
        VALUE_DIM=value_dim,
        WIDTH=triton.next_power_of_2(value_dim),
        ROWS=_ROWS,
    )
