"""Random experts in few bits."""

import torch

from hotset.experts.narrow import NarrowLayout


def make_payloads(layout: NarrowLayout, num_experts: int) -> torch.Tensor:
    """Random bits, all of them numbers."""
    payloads = torch.zeros(num_experts, layout.payload_bytes, dtype=torch.uint8)
    for matrix in layout.matrices:
        codes, scales, zeros = layout.views(payloads, matrix)
        codes.copy_(torch.randint(0, 256, codes.shape))
        if layout.form.code == "e4m3":
            codes.masked_fill_(codes & 127 == 127, 56)
        if layout.form.scale == "e8m0":
            scales.copy_(torch.randint(117, 125, scales.shape))
        else:
            scales.copy_(torch.rand(scales.shape) * (2e-3 if layout.form.code == "e4m3" else 0.03))
        if zeros is not None:
            zeros.copy_(torch.randint(0, 16, zeros.shape))
    return payloads
