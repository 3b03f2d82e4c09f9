"""Checkpoints of integers with a scale for each group of a row: AWQ, GPTQ, compressed-tensors.

`W = (code - zero) * scale`. N = rows of a weight, K = columns, G = groups of a row, P = codes in 32
bits, the first in the lowest bits.

- `awq`: `qweight [K, N / P]` and `qzeros [G, N / P]`, whose codes are in the order 0, 2, 4, 6, 1,
  3, 5, 7; `scales [G, N]`.
- `gptq`: `qweight [K / P, N]`, `scales [G, N]`, and `g_idx [K]`, the group of each column, which is
  not in order where they were quantised by their weight (`desc_act`). The zero is the middle code:
  what `qzeros` holds of a symmetric checkpoint differs with its version.
- `packed` (compressed-tensors' `pack-quantized`): `weight_packed [N, K / P]`, `weight_scale [N, G]`
  and, if it is not symmetric, `weight_zero_point [N / P, G]`.

Source: `packing_utils.py` of AutoAWQ; `QuantLinear` of AutoGPTQ; `pack_quantized.py` of
compressed-tensors.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hotset.checkpoint.files import Stored
from hotset.cost.quantisation import IntForm
from hotset.errors import ModelError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each code of 32 bits is
_PIECE_VALUES = 2**22
# By form: codes, scales, and zeros or groups; and what is not needed.
_NAMES = {
    "awq": ("qweight", "scales", "qzeros", ()),
    "gptq": ("qweight", "scales", "g_idx", ("qzeros",)),
    "packed": ("weight_packed", "weight_scale", "weight_zero_point", ("weight_shape",)),
}


def find_weights(
    folder: Path, form: IntForm, stored: Mapping[str, Stored]
) -> dict[str, tuple[str, ...]]:
    """Name of a weight -> the names of its codes, scales, and zeros or groups, if it has some.

    Raises:
        ModelError: some are missing, or of shapes that do not fit together.
    """
    codes, scales, more, _ = _NAMES[form.kind]
    found = {}
    for name, tensor in stored.items():
        layer, _, last = name.rpartition(".")
        if last != codes:
            continue
        parts = [name, f"{layer}.{scales}", f"{layer}.{more}"]
        if not form.has_zeros and parts[-1] not in stored:
            parts.pop()
        rows, columns = shape_of(form, tensor)
        groups = 1 if form.group is None else -(-columns // form.group)
        words = -(-rows // form.per_word)
        expected = {
            "awq": ((groups, rows), (groups, words)),
            "gptq": ((groups, rows), (columns,)),
            "packed": ((rows, groups), (words, groups)),
        }
        for part, shape in zip(parts[1:], expected[form.kind], strict=False):
            has = stored[part].shape if part in stored else None
            if has != shape:
                raise ModelError(
                    f"{folder}: {part} is {'missing' if has is None else list(has)}, expected "
                    f"{list(shape)} for {form.bits}-bit weights of {[rows, columns]} in groups of "
                    f"{form.group or columns}"
                )
        found[f"{layer}.weight"] = tuple(parts)
    return found


def unneeded(form: IntForm, weight: str) -> tuple[str, ...]:
    """Names of tensors that belong to a weight and are not read."""
    return tuple(f"{weight.removesuffix('weight')}{name}" for name in _NAMES[form.kind][3])


def shape_of(form: IntForm, codes: Stored) -> tuple[int, int]:
    """`[N, K]` of the weight that codes make."""
    first, last = codes.shape
    if form.kind == "packed":
        return first, last * form.per_word
    return (last * form.per_word, first) if form.kind == "awq" else (last, first * form.per_word)


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    more: torch.Tensor | None = None,
    *,
    form: IntForm,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`[N, K]` of `dtype`, computed in float32, in pieces; see above for the parts."""
    values, factors, zeros = _opened(codes, scales, more, form)
    groups = more if form.kind == "gptq" else None
    rows, columns = values.shape
    if groups is None:
        groups = torch.arange(columns, device=values.device) // (form.group or columns)
    groups, step = groups.long(), max(1, _PIECE_VALUES // columns)
    out = torch.empty(rows, columns, dtype=dtype, device=values.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        piece = values[part].float()
        piece -= 2.0 ** (form.bits - 1) if zeros is None else zeros[part].float()[:, groups]
        out[part] = piece.mul_(factors[part].float()[:, groups])
    return out


def planes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    more: torch.Tensor | None = None,
    *,
    form: IntForm,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zeros `[N, G]` in a `weight_format`: `[N, K / 2]` of 4-bit codes.

    Codes of 8 bits are `[N, K]`, signed: the middle one is 0.

    Raises:
        ValueError: columns of a group are apart.
    """
    values, factors, zeros = _opened(codes, scales, more, form)
    if form.kind == "gptq" and more is not None:
        columns = torch.arange(len(more), device=more.device)
        if not torch.equal(more.long(), columns // (form.group or len(more))):
            raise ValueError("columns of a group are apart (desc_act)")
    if form.bits == 8:
        return values ^ 128, factors, None
    return values[:, ::2] | values[:, 1::2] << 4, factors, zeros


def _opened(
    codes: torch.Tensor, scales: torch.Tensor, more: torch.Tensor | None, form: IntForm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes `[N, K]`, a byte each; scales `[N, G]`; and zeros `[N, G]` where groups have some."""
    if form.kind == "awq":
        assert more is not None
        return _unpacked(codes, form).t(), scales.t(), _unpacked(more, form).t()
    if form.kind == "gptq":
        return _unpacked(codes.t(), form), scales.t(), None
    zeros = None if more is None else _unpacked(more.t(), form).t()
    return _unpacked(codes, form), scales, zeros


def _unpacked(words: torch.Tensor, form: IntForm) -> torch.Tensor:
    """`[R, C]` int32 to the `[R, C * P]` uint8 codes in them."""
    codes = torch.empty(*words.shape, form.per_word, dtype=torch.uint8, device=words.device)
    for place in range(form.per_word):
        codes[..., place] = words >> place * form.bits & (1 << form.bits) - 1
    if form.kind == "awq":
        codes = codes[..., list(_AWQ_ORDER)]
    return codes.flatten(1)
