"""8-bit floats (e4m3): 4 bits of exponent, 3 of mantissa, no infinity, up to 448."""

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX: float = torch.finfo(FP8).max


def to_fp8(values: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """`values / scale` to the nearest 8-bit float; values beyond 448 become 448, NaN stays.

    Args:
        values: any shape, any float dtype.
        scale: above 0; a float, or float32 that broadcasts to `values`.

    Reference of `kernels.store_kv` for floats, bit-exact.
    """
    scaled = values.float() * (1 / scale)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8)
