"""Checkpoints of 8-bit floats with a scale for each block, each row or each weight.

A weight `W` is stored as `q`, 8-bit floats of its shape, and `s`: `W = q * s`.

- `fp8`, `mxfp8` (DeepSeek-V3, Qwen3-FP8, Mistral): `s` is `..._scale_inv`, one for each block of
  `weight_block_size`, or one for all of the weight where that is null. A shape that is no multiple
  of the block ends in smaller blocks.
- `modelopt` with the algorithm FP8 (NVIDIA), and `fp8` of AutoFP8: `s` is `..._scale`, one for all
  of the weight.
- `fbgemm_fp8` (Llama 3.1 405B): `s` is `..._scale`, one for each row.
- `compressed-tensors`: `s` is `..._scale`, for all, each row or each block. `q` may be integers.

Source: DeepSeek-V3's `inference/fp8_cast_bf16.py`; `Fp8Dequantize` and `FbgemmFp8Linear` of
transformers; `ModelOptFp8LinearMethod` and `Fp8LinearMethod` of vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hotset.checkpoint.files import Stored
from hotset.checkpoint.quantized import quant_method
from hotset.cost.quantisation import narrow_weights, quant_config
from hotset.errors import ModelError
from hotset.linear.narrow_matrix import open_scales

Block = tuple[int, int | None] | None  # rows and columns that share a scale; None is all

_DEFAULT_BLOCK = (128, 128)  # of transformers, where the config names none
_PIECE_VALUES = 2**22
FLOATS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "F16", "BF16", "F8_E8M0", "U8")


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """How a checkpoint stores 8-bit weights.

    Attributes:
        suffix: of the name of the scales, after the weight's.
        block: rows and columns that share a scale.
        dtypes: of weights, in safetensors' words.
    """

    suffix: str
    block: Block
    dtypes: tuple[str, ...] = FLOATS


def fp8_format(
    folder: Path, fields: Mapping[str, Any], stored: Mapping[str, Stored]
) -> Fp8Format | None:
    """How weights are stored, by config and names; None where it is not in one of these ways.

    Raises:
        ModelError: its block is none.
    """
    method = quant_method(fields)
    if method == "fp8" and _has_one_scale_each(fields, stored):
        return Fp8Format("_scale", None)
    if method in ("fp8", "mxfp8"):
        block = (quant_config(fields) or {}).get("weight_block_size", _DEFAULT_BLOCK)
        return Fp8Format("_scale_inv", _checked(folder, block))
    if method is not None and method.startswith("modelopt"):  # only FP8 gets here
        return Fp8Format("_scale", None)
    if method == "fbgemm_fp8":
        return Fp8Format("_scale", (1, None))
    if (narrow := narrow_weights(quant_config(fields) or {})) is not None:
        kind, block = narrow
        return Fp8Format("_scale", _checked(folder, block), ("I8",) if kind == "int" else FLOATS)
    return None


def _has_one_scale_each(fields: Mapping[str, Any], stored: Mapping[str, Stored]) -> bool:
    """Whether it is of AutoFP8, whose config has the method of blocks, but names no block."""
    narrow = [name for name, tensor in stored.items() if tensor.dtype in FLOATS]
    names_block = "weight_block_size" in (quant_config(fields) or {})
    return bool(narrow) and not names_block and all(f"{name}_scale" in stored for name in narrow)


def _checked(folder: Path, block: Any) -> Block:
    """A block of a config, if it is one; None is one too."""
    if block is None:
        return None
    if block == (1, None):
        return 1, None
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ModelError(
            f"{folder}/config.json: weight_block_size is {block!r}, expected two whole numbers "
            "above 0, or null"
        )
    return sizes[0], sizes[1]


def pair_scales(folder: Path, form: Fp8Format, stored: Mapping[str, Stored]) -> dict[str, str]:
    """The name of the scales of each 8-bit weight.

    Raises:
        ModelError: a weight without scales, or scales that do not fit its shape and the block.
    """
    pairs = {}
    for name, tensor in stored.items():
        if tensor.dtype in form.dtypes:
            pairs[name] = scales = f"{name}{form.suffix}"
            _check_scales(folder, scales, tensor, stored.get(scales), form.block)
    return pairs


def input_scales(weight: str) -> tuple[str, str]:
    """Names of what divides the inputs of an 8-bit product, which dequantised weights need not."""
    is_stacked = not weight.endswith(".weight")
    stem = f"{weight}_" if is_stacked else weight.removesuffix("weight")
    return f"{stem}activation_scale", f"{stem}input_scale"


def dequantise(
    weight: torch.Tensor, scales: torch.Tensor, *, block: Block, dtype: torch.dtype
) -> torch.Tensor:
    """`q * s`, computed in float32, in pieces: float32 copies of a whole weight are large.

    Args:
        weight: `[..., rows, columns]` of 8-bit floats.
        scales: one for each block of the last two dimensions, as `pair_scales` checked; of bytes,
            they are exponents of 2 with a bias of 127.
        block: rows and columns that share a scale.
        dtype: of the result.
    """
    factors = open_scales(scales)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.ndim > 2:  # one expert at a time
        each = factors.reshape(1).expand(len(weight)) if factors.numel() == 1 else factors
        for to, part, factor in zip(out, weight, each, strict=True):
            to.copy_(dequantise(part, factor, block=block, dtype=dtype))
        return out
    if weight.ndim < 2:
        return out.copy_(weight.float() * factors)
    rows, columns = weight.shape
    height, width = (1, None) if block is None else block
    step = max(1, _PIECE_VALUES // columns // height) * height
    for start in range(0, rows, step):
        piece = weight[start : start + step].float()
        if block is None:
            spread = factors.reshape(())
        else:
            spread = factors[start // height : -(-(start + len(piece)) // height)]
            spread = spread.repeat_interleave(height, 0)[: len(piece)]
            if width is not None:
                spread = spread.repeat_interleave(width, 1)[:, :columns]
        out[start : start + step] = piece.mul_(spread)
    return out


def planes(
    weight: torch.Tensor, scales: torch.Tensor, *, block: Block
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Codes `[N, K]` as bytes, and float32 scales of each block; see `weight_format`."""
    factors = open_scales(scales)
    num_rows = 1 if block is None else -(-len(weight) // block[0])
    return weight.view(torch.uint8), factors.view(num_rows, -1), None


def _check_scales(
    folder: Path, name: str, weight: Stored, scales: Stored | None, block: Block
) -> None:
    if scales is None:
        raise ModelError(
            f"{folder} stores a weight as {weight.dtype} without its scales, {name}; the "
            "checkpoint is incomplete or of another format"
        )
    expected = _scale_shapes(weight.shape, block)
    if scales.dtype not in _SCALES or scales.shape not in expected:
        raise ModelError(
            f"{folder}: {name} is {scales.dtype} {list(scales.shape)}, expected "
            f"{list(expected[0])} for a weight of {list(weight.shape)} with a scale for "
            f"{_in_words(block)}"
        )


def _in_words(block: Block) -> str:
    if block is None:
        return "all of it"
    if block[1] is None:
        return "each row"
    return f"each block of {list(block)} (weight_block_size)"


def _scale_shapes(shape: tuple[int, ...], block: Block) -> list[tuple[int, ...]]:
    """The shapes that scales of a weight may have."""
    if len(shape) < 2:
        return [()]
    if block is None:
        stacked = [(*shape[:-2], 1, 1), shape[:-2]] if len(shape) == 3 else []
        return [(), (1,), (1, 1), *stacked]
    columns = 1 if block[1] is None else -(-shape[-1] // block[1])
    return [(*shape[:-2], -(-shape[-2] // block[0]), columns)]
