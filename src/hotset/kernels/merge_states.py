"""Joining attention over two parts of a context."""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _merge_states(  # type: ignore[no-untyped-def]
    output,
    sums,
    other,
    other_sums,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    one, two = tl.load(sums + row), tl.load(other_sums + row)
    largest = tl.maximum(one, two)
    weight, other_weight = tl.exp2(one - largest), tl.exp2(two - largest)
    total = weight + other_weight
    i = tl.arange(0, WIDTH)
    inside = i < VALUE_DIM
    a = tl.load(output + row * VALUE_DIM + i, mask=inside).to(tl.float32)
    b = tl.load(other + row * VALUE_DIM + i, mask=inside).to(tl.float32)
    merged = (a * weight + b * other_weight) / total
    tl.store(output + row * VALUE_DIM + i, merged.to(output.dtype.element_ty), mask=inside)
    tl.store(sums + row, largest + tl.log2(total))


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
    _merge_states[(num_tokens * num_heads,)](
        output,
        sums,
        other,
        other_sums,
        VALUE_DIM=value_dim,
        WIDTH=triton.next_power_of_2(value_dim),
    )
