"""Checkpoints whose experts are 4-bit floats with a shared exponent for 32 of them: gpt-oss.

E = experts. Weights `[E, inputs, outputs]` are stored as `..._blocks`, bytes of two values each,
the lower half first, `[E, outputs, inputs / 32, 16]`, and `..._scales`, bytes that are exponents of
2 with a bias of 127, `[E, outputs, inputs / 32]`.
Source: OCP Microscaling Formats 1.0, section 5.3; `convert_moe_packed_tensors` of transformers.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hotset.checkpoint.files import Stored
from hotset.errors import ModelError
from hotset.linear.narrow_matrix import open_codes, open_scales
from hotset.weight_format import MXFP4

_BLOCK = 32
_BYTES = _BLOCK // 2


def find_blocks(folder: Path, stored: Mapping[str, Stored]) -> dict[str, tuple[str, str]]:
    """Name of a weight -> the names of its blocks and scales.

    Raises:
        ModelError: blocks without scales, or of shapes that do not fit together.
    """
    found = {}
    for name, blocks in stored.items():
        if not name.endswith("_blocks"):
            continue
        weight = name.removesuffix("_blocks")
        scales = stored.get(f"{weight}_scales")
        fits = (
            scales is not None
            and blocks.dtype == scales.dtype == "U8"
            and len(blocks.shape) == 4
            and blocks.shape == (*scales.shape, _BYTES)
        )
        if not fits:
            has = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise ModelError(
                f"{folder}: {name} is {blocks.dtype} {list(blocks.shape)} and its scales "
                f"{has}; expected U8 [experts, outputs, inputs / {_BLOCK}, {_BYTES}], and scales "
                "without the last"
            )
        found[weight] = (name, f"{weight}_scales")
    return found


def shape_of(blocks: Stored) -> tuple[int, ...]:
    """The shape of the weight that blocks make."""
    experts, outputs, groups, _ = blocks.shape
    return experts, groups * _BLOCK, outputs


def planes(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Codes `[outputs, inputs / 2]` and scales of one expert, as they are; see `weight_format`."""
    return blocks.flatten(-2), scales, None


def dequantise(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[experts, inputs, outputs]` of `dtype`, one expert at a time; exact in bfloat16."""
    experts, outputs, groups, _ = blocks.shape
    out = torch.empty(experts, groups * _BLOCK, outputs, dtype=dtype, device=blocks.device)
    for weight, packed, exponents in zip(out, blocks, scales, strict=True):
        values = open_codes(MXFP4, packed)  # [outputs, groups, 32]
        values *= open_scales(exponents)[..., None]
        weight.copy_(values.flatten(-2).t())
    return out
