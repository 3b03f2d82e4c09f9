"""Checkpoints of 4-bit floats with a scale of 8 bits for 16 of them, and one for all: NVFP4.

N = rows of a weight, K = columns. `W = code * scale * factor`, codes two in a byte, the lower half
first.

- `modelopt` (NVIDIA ModelOpt): `weight [N, K / 2]`, `weight_scale [N, K / 16]`, and
  `weight_scale_2`, the factor.
- `packed` (compressed-tensors' `nvfp4-pack-quantized`): `weight_packed`, `weight_scale`, and
  `weight_global_scale`, which the factor is one over.

Gate and up of an expert may have other factors, which therefore stay scales of rows. Source:
`nvfp4_tensor.py` of ModelOpt; `nvfp4_quantized.py` of compressed-tensors.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hotset.checkpoint.files import Stored
from hotset.cost.quantisation import Nvfp4Kind
from hotset.errors import ModelError
from hotset.linear.narrow_matrix import open_codes
from hotset.weight_format import NVFP4

_GROUP = 16
_PIECE_VALUES = 2**22
# By kind: codes, scales, and what makes the factor; and what is not needed.
_NAMES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "packed": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


def find_weights(
    folder: Path, kind: Nvfp4Kind, stored: Mapping[str, Stored]
) -> dict[str, tuple[str, ...]]:
    """Name of a weight -> the names of its codes, scales and factor.

    Raises:
        ModelError: some are missing, or of shapes that do not fit together.
    """
    codes, scales, factor, _ = _NAMES[kind]
    found: dict[str, tuple[str, ...]] = {}
    for name, tensor in stored.items():
        layer, _, last = name.rpartition(".")
        if last != codes or tensor.dtype != "U8":
            continue
        parts = (name, f"{layer}.{scales}", f"{layer}.{factor}")
        rows, columns = shape_of(tensor)
        expected = (((rows, columns // _GROUP),), ((), (1,)))
        for part, dtype, shapes in zip(parts[1:], ("F8_E4M3", "F32"), expected, strict=True):
            has = stored.get(part)
            if has is None or has.dtype != dtype or has.shape not in shapes:
                is_there = "missing" if has is None else f"{has.dtype} {list(has.shape)}"
                raise ModelError(
                    f"{folder}: {part} is {is_there}, expected {dtype} {list(shapes[0])} for NVFP4 "
                    f"weights of {[rows, columns]}"
                )
        found[f"{layer}.weight"] = parts
    return found


def unneeded(kind: Nvfp4Kind, weight: str) -> str:
    """The name of what divides a weight's inputs where these are rounded, which they are not."""
    return f"{weight.removesuffix('weight')}{_NAMES[kind][3]}"


def shape_of(codes: Stored) -> tuple[int, int]:
    """`[N, K]` of the weight that codes make."""
    rows, num_bytes = codes.shape
    return rows, 2 * num_bytes


def planes(
    codes: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor, *, kind: Nvfp4Kind
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales as they are, and float32 scales of rows, all the same; `weight_format`."""
    return codes, scales, _factor(factor, kind).expand(len(codes))


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    factor: torch.Tensor,
    *,
    kind: Nvfp4Kind,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`[N, K]` of `dtype`, computed in float32, in pieces."""
    rows, columns = len(codes), 2 * codes.shape[1]
    step, times = max(1, _PIECE_VALUES // columns), _factor(factor, kind)
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    for start in range(0, rows, step):
        piece = open_codes(NVFP4, codes[start : start + step])
        piece *= scales[start : start + step].float().repeat_interleave(_GROUP, -1)
        out[start : start + step] = piece.mul_(times)
    return out


def _factor(stored: torch.Tensor, kind: Nvfp4Kind) -> torch.Tensor:
    """`[1]` float32."""
    factor = stored.float().reshape(1)
    return factor if kind == "modelopt" else 1 / factor
