"""Checkpoints of 8-bit floats with a scale for each block: DeepSeek-V3, Qwen3-FP8, Mistral.

A weight `W` is stored as `q`, 8-bit floats of its shape, and `s`, a scale for each block of
`weight_block_size` (one for all of it where that is null): `W = q * s`. A shape that is no multiple
of the block ends in smaller blocks.
Source: DeepSeek-V3's `inference/fp8_cast_bf16.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hotset.errors import ModelError
from hotset.model.checkpoint_files import Stored
from hotset.model.quantized import quant_config, quant_method

METHODS = ("fp8", "mxfp8")  # of transformers
Block = tuple[int, int] | None

_DEFAULT_BLOCK = (128, 128)  # of transformers, where the config names none
_WEIGHTS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "F16", "BF16", "F8_E8M0", "U8")
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "BOOL")


def block_size(folder: Path, fields: Mapping[str, Any]) -> Block:
    """Rows and columns that share a scale; None is one scale for each weight.

    Raises:
        ModelError: the config says something else.
    """
    block = (quant_config(fields) or {}).get("weight_block_size", _DEFAULT_BLOCK)
    if block is None:
        return None
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ModelError(
            f"{folder}/config.json: weight_block_size is {block!r}, expected two whole numbers "
            "above 0, or null"
        )
    return sizes


def pair_scales(
    folder: Path, fields: Mapping[str, Any], stored: Mapping[str, Stored]
) -> dict[str, str]:
    """The name of the scales of each 8-bit weight; empty where the checkpoint has no such format.

    Raises:
        ModelError: a weight without scales, scales that do not fit its shape and the block, or a
            tensor of another narrow kind.
    """
    if quant_method(fields) not in METHODS:
        return {}
    block, pairs = block_size(folder, fields), {}
    for name, tensor in stored.items():
        if tensor.dtype in _WEIGHTS:
            pairs[name] = scales = f"{name}_scale_inv"
            _check_scales(folder, name, tensor, stored.get(scales), block)
    scale_names = set(pairs.values())
    for name, tensor in stored.items():
        if tensor.dtype not in (*_PLAIN, *_WEIGHTS) and name not in scale_names:
            raise ModelError(
                f"{folder}: {name} is stored as {tensor.dtype}, which no FP8 checkpoint that "
                "hotset reads has; take the model's unquantised weights"
            )
    return pairs


def input_scales(weight: str) -> tuple[str, str]:
    """Names of what divides the inputs of an 8-bit product, which dequantised weights need not."""
    stem = weight.removesuffix("weight")
    return f"{stem}activation_scale", f"{stem}input_scale"


def dequantise(
    weight: torch.Tensor, scales: torch.Tensor, block: Block, dtype: torch.dtype
) -> torch.Tensor:
    """`q * s`, computed in float32.

    Args:
        weight: `[..., rows, columns]` of 8-bit floats.
        scales: one for each block of the last two dimensions, as `pair_scales` checked; of bytes,
            they are exponents of 2 with a bias of 127.
        block: rows and columns that share a scale; None is all.
        dtype: of the result.
    """
    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    if weight.ndim > 2:  # one expert at a time: float32 copies are large
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        each = factors.expand(len(weight)) if factors.numel() == 1 else factors
        for row, part, factor in zip(out, weight, each, strict=True):
            row.copy_(dequantise(part, factor, block, dtype))
        return out
    if block is None:
        return (weight.float() * factors.reshape(())).to(dtype)
    rows, columns = weight.shape
    spread = factors.repeat_interleave(block[0], 0)[:rows]
    spread = spread.repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * spread).to(dtype)


def _check_scales(
    folder: Path, name: str, weight: Stored, scales: Stored | None, block: Block
) -> None:
    if scales is None:
        raise ModelError(
            f"{folder}: {name} is stored as {weight.dtype} without its scales, {name}_scale_inv; "
            "the checkpoint is incomplete or of another format"
        )
    expected = _scale_shapes(weight.shape, block)
    if scales.dtype not in _SCALES or scales.shape not in expected:
        raise ModelError(
            f"{folder}: {name}_scale_inv is {scales.dtype} {list(scales.shape)}, expected "
            f"{list(expected[0])} for a weight of {list(weight.shape)} in blocks of "
            f"{'its size' if block is None else list(block)} (weight_block_size)"
        )


def _scale_shapes(shape: tuple[int, ...], block: Block) -> list[tuple[int, ...]]:
    """The shapes that scales of a weight may have."""
    if len(shape) < 2:
        return [()]
    if block is None:
        stacked = [(*shape[:-2], 1, 1), shape[:-2]] if len(shape) == 3 else []
        return [(), (1,), (1, 1), *stacked]
    counts = (-(-size // per) for size, per in zip(shape[-2:], block, strict=True))
    return [(*shape[:-2], *counts)]
