"""Copying experts of few bits from where they are into wide slots on the device."""

import math
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from hotset.cost.tuning import TUNINGS
from hotset.weight_format import WeightFormat

# Narrow bytes that a program moves at a time become one or two values each, so that half of
# `Tuning.copy_bytes` are enough to be in registers.
_TILE_BYTES = 8192
_MOST_WIDTH = 2048


class _Layout(Protocol):
    """See `experts.narrow.NarrowLayout`, and `linear.narrow_matrix.NarrowMatrix`."""

    form: WeightFormat
    payload_bytes: int
    matrices: tuple[Any, ...]


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise_matrix(  # type: ignore[no-untyped-def]
    values,
    scales,
    target,
    NUM_RUNS: tl.constexpr,
    RUN: tl.constexpr,
    RUN_BYTES: tl.constexpr,
    RUNS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_INT4: tl.constexpr,
):
    part = tl.program_id(1)
    for first in range(part * RUNS, NUM_RUNS, tl.num_programs(1) * RUNS):
        run = first + tl.arange(0, RUNS)
        scale = tl.load(scales + run, mask=run < NUM_RUNS, other=0.0).to(tl.float32)[:, None]
        for start in range(0, RUN_BYTES, WIDTH):
            i = start + tl.arange(0, WIDTH)
            inside = (run < NUM_RUNS)[:, None] & (i < RUN_BYTES)[None, :]
            number = tl.load(values + run[:, None] * RUN_BYTES + i[None, :], mask=inside, other=0)
            if IS_INT4:  # two neighbours in a byte
                low = ((number & 15).to(tl.float32) - 8.0) * scale
                high = ((number >> 4).to(tl.float32) - 8.0) * scale
                both = tl.interleave(low, high).to(target.dtype.element_ty)
                j = 2 * start + tl.arange(0, 2 * WIDTH)
                is_real = (run < NUM_RUNS)[:, None] & (j < 2 * RUN_BYTES)[None, :]
                tl.store(target + run[:, None] * RUN + j[None, :], both, mask=is_real)
            else:
                place = target + run[:, None] * RUN + i[None, :]
                # As a half float with the same exponent and mantissa, which is 2**8 too small:
                # GPUs before Ada have no 8-bit floats.
                bits = number.to(tl.uint16)
                half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
                exact = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
                tl.store(place, (exact * scale).to(target.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise_experts(  # type: ignore[no-untyped-def]
    source,
    scales,
    target,
    experts,
    slots,
    num_places,
    SOURCE_BYTES: tl.constexpr,
    SOURCE_SCALES: tl.constexpr,
    TARGET_VALUES: tl.constexpr,
    DOWN_AT: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    IS_INT4: tl.constexpr,
):
    for place in range(tl.program_id(0), num_places, tl.num_programs(0)):
        expert = tl.load(experts + place).to(tl.int64)
        if expert >= 0:
            slot = tl.load(slots + place).to(tl.int64)
            values = source + expert * SOURCE_BYTES
            factors = scales + expert * SOURCE_SCALES
            wide = target + slot * TARGET_VALUES
            _dequantise_matrix(
                values + UP[0], factors + UP[1], wide,
                UP[2], UP[3], UP[4], UP[5], UP[6], IS_INT4,
            )  # fmt: skip
            _dequantise_matrix(
                values + DOWN[0], factors + DOWN[1], wide + DOWN_AT,
                DOWN[2], DOWN[3], DOWN[4], DOWN[5], DOWN[6], IS_INT4,
            )  # fmt: skip


def dequantise_experts(
    layout: _Layout,
    source: torch.Tensor,
    target: torch.Tensor,
    experts: torch.Tensor,
    slots: torch.Tensor,
    *,
    beside_compute: bool = False,
) -> None:
    """Copy expert `experts[i]` of `source` to `target[slots[i]]`, widened, in place.

    N = copies at most. The up matrix comes first in a row of `target`, the down matrix after it.

    Args:
        layout: of the rows of `source`, as `experts.narrow.rounded_layout` makes them.
        source: `[E, layout.payload_bytes]` uint8, contiguous; on the device, or pinned host memory,
            which the device reads itself.
        target: `[S, V]` on the device, its rows contiguous, of the dtype of the weights. Mutated.
        experts: `[N]` int64 on the device; -1 for no copy.
        slots: `[N]` int64 on the device; distinct where there is a copy.
        beside_compute: other kernels run meanwhile, so take few of the processors.

    Cost: `layout.payload_bytes` over the link for each copy. Nothing is asked of the host, so that
    a CUDA graph can record it.
    Reference: `experts.narrow.NarrowLayout.dequantise`, bit-exact.
    """
    if not len(experts):
        return
    scales = source.view(torch.bfloat16 if layout.form.code == "int4" else torch.float32)
    up, down = layout.matrices
    tuning = TUNINGS[target.device.type]
    most = tuning.copies_beside_compute if beside_compute else len(experts)
    _dequantise_experts[(min(len(experts), most), tuning.copy_programs)](
        source,
        scales,
        target,
        experts,
        slots,
        len(experts),
        SOURCE_BYTES=layout.payload_bytes,
        SOURCE_SCALES=scales.shape[1],
        TARGET_VALUES=target.stride(0),
        DOWN_AT=up.shape[0] * up.shape[1],
        UP=_sizes(up),
        DOWN=_sizes(down),
        IS_INT4=layout.form.code == "int4",
        num_warps=8,
    )


def _sizes(matrix: Any) -> tuple[int, ...]:
    """Where values and scales begin; runs, and values and bytes of one; runs and bytes of a tile.

    A tile has whole runs, where they are not too long, so that a scale is read once for its run.
    """
    codes, scales = matrix.codes, matrix.scales
    num_runs = math.prod(scales.shape)
    run_bytes = codes.num_bytes // num_runs
    width = min(triton.next_power_of_2(run_bytes), _MOST_WIDTH)
    return (
        codes.offset,
        scales.offset * num_runs // scales.num_bytes,
        num_runs,
        math.prod(matrix.shape) // num_runs,
        run_bytes,
        max(1, _TILE_BYTES // width),
        width,
    )
