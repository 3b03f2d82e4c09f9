"""Index keys as 8-bit floats (e4m3): turned, so that no number stands out, and rounded.

A Hadamard transform of queries and keys leaves their products as they are, and spreads what one
number of a key has over all of them. Then each number is rounded, with one scale per key, a power
of two, so that nothing but that rounding changes a score.

Source: `rotate_activation` and `act_quant` (scales as `ue8m0`) in DeepSeek-V3.2-Exp's
`inference/model.py` and `kernel.py`. There queries are rounded, too; here they keep their dtype.
"""

import torch

from hotset.errors import ConfigError
from hotset.linear.fp8 import FP8, FP8_MAX

_LEAST = 1e-4  # of the largest number of a key, so that its scale is no denormal number
_LEAST_WIDTH = 16  # of a key, as the kernels multiply tiles of it


def check_width(width: int) -> None:
    """Raise ConfigError where keys of `width` numbers cannot be turned."""
    if width < _LEAST_WIDTH or width & (width - 1):
        raise ConfigError(
            f"index_dtype is fp8, but index keys of {width} numbers cannot be rounded: supported "
            f"are powers of two from {_LEAST_WIDTH} on; expected auto"
        )


def turn(x: torch.Tensor) -> torch.Tensor:
    """The Hadamard transform of `[..., D]`, float32; D a power of two.

    Its matrix has 1 or -1 everywhere: two turned vectors have D times the product that they had.
    """
    width, size = x.shape[-1], 1
    x = x.float()
    while size < width:  # in the same order whatever else is turned
        one, other = x.unflatten(-1, (-1, 2, size)).unbind(-2)
        x = torch.stack([one + other, one - other], dim=-2).flatten(-3)
        size *= 2
    return x


def turned_query(query: torch.Tensor) -> torch.Tensor:
    """What scores turned keys as `query`, `[..., D]`, scores keys; its dtype."""
    return (turn(query) / query.shape[-1]).to(query.dtype)


def round_keys(turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[..., D]` as 8-bit floats, and the `[...]` float32 that these are multiplied with.

    A scale is the least power of two that takes the largest number of its key to 448 or less.
    """
    turned = turned.float()
    mantissa, exponent = torch.frexp(turned.abs().amax(-1).clamp(min=_LEAST))
    # 448 is 7/8 of 2**9.
    exponent = exponent - 9 + (mantissa > 7 / 8).int()
    scales = torch.ldexp(torch.ones_like(mantissa), exponent)
    scaled = torch.ldexp(turned, -exponent.unsqueeze(-1))
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8), scales


def store_keys(
    key: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor,
    slots: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Write the keys of a step's tokens to their places, turned and rounded.

    Args:
        key: `[T, D]`.
        keys: `[num_blocks, block_size, D]` float8_e4m3fn. Mutated.
        scales: `[num_blocks, block_size]` float32. Mutated.
        slots: `[T]` blocks, and `[T]` offsets in them.

    Reference of `kernels.store_index`.
    """
    rounded, scale = round_keys(turn(key))
    # Moved as bytes: not every indexing operation knows 8-bit floats.
    keys.view(torch.uint8)[slots] = rounded.view(torch.uint8)
    scales[slots] = scale


def widen_keys(keys: torch.Tensor, scales: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The keys of some blocks, `[N, block_size, D]` float32, turned as they were stored."""
    found = keys.view(torch.uint8)[blocks].view(FP8).float()
    return found * scales[blocks].unsqueeze(-1)
