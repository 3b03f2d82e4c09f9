"""Experts of random numbers in few bits, for trials, benchmarks and tests."""

import math

import torch

from hotset.experts.narrow import NarrowLayout
from hotset.weight_format import Code

# Root mean square of the numbers that all codes stand for; of e4m3 without what are none.
_CODE_RMS: dict[Code, float] = {"e4m3": 125.5, "e2m1": 2.93, "int4": 4.64, "int8": 73.9}
_GROUP_SCALE = 8.0  # where rows have scales too
_SPREAD = 0.5  # scales are within this part of their mean


def random_payloads(
    layout: NarrowLayout,
    num_experts: int,
    *,
    std: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """`[num_experts, payload_bytes]` uint8: random bits, all of them numbers.

    Args:
        layout: of a payload.
        num_experts: of a layer.
        std: standard deviation of the weights, or nearly, as scales may be powers of 2.
        generator: of `device`; None is the default one.
        device: where they are made; None is the CPU.
    """
    size = (num_experts, layout.payload_bytes)
    payloads = torch.zeros(size, dtype=torch.uint8, device=device)
    scale = std / _CODE_RMS[layout.form.code]
    for matrix in layout.matrices:
        codes, scales, more = matrix.views(payloads)
        codes.random_(0, 256, generator=generator)
        if layout.form.code == "e4m3":
            codes.masked_fill_(codes & 127 == 127, 56)
        if layout.form.scale == "e8m0":
            exponent = 127 + round(math.log2(scale))
            scales.random_(exponent - 1, exponent + 2, generator=generator)
        else:
            mean = _GROUP_SCALE if layout.form.has_row_scales else scale
            drawn = torch.empty(scales.shape, device=device)
            drawn.uniform_((1 - _SPREAD) * mean, (1 + _SPREAD) * mean, generator=generator)
            scales.copy_(drawn)
        if more is not None and layout.form.has_zeros:
            more.random_(0, 16, generator=generator)
        elif more is not None:
            more.fill_(scale / _GROUP_SCALE)
    return payloads
