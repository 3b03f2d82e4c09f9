"""Experts in fewer bits than they are computed with, for less memory and less to move.

Either a checkpoint has them so, and its own bytes are kept (`checkpoint.narrow_experts`), or
`expert_cold_dtype` rounds them. Then a run of values along the last dimension of a weight, as it is
stored, shares a scale:
  fp8 -- 8-bit floats (e4m3), a float32 scale for each row, which its largest value fits.
  int4 -- -8 to 7, two in a byte, a bfloat16 scale for each group of 64 values. The scale has the
    sign that gives the value of largest magnitude -8: all 16 numbers are used, and there is no
    offset to store. Source: Q4_0 of GGML, which has groups of 32; with 64 the scales are 6 % of the
    bytes and not 11.

A value is that number times its scale in float32, rounded once to the dtype of the weights. So it
is the same bits wherever it is computed.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hotset.errors import ConfigError
from hotset.expert_options import ColdDType
from hotset.linear.narrow_matrix import NarrowMatrix, Planes
from hotset.memory.disk.slab import slot_bytes_for
from hotset.weight_format import FP8_ROW, INT4, WeightFormat

NarrowDType = Literal["fp8", "int4"]

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_LEAST_SCALE = 1e-12  # of a row of zeros
_LEAST_GROUP = 8
_PIECE_VALUES = 2**26

# All layouts of this process, for operations that get strings and tensors alone.
LAYOUTS: "dict[str, NarrowLayout]" = {}

Shape = tuple[int, ...]
Largest = Callable[[torch.Tensor], torch.Tensor]


class NarrowLayout:
    """One expert in few bits as a run of bytes: the planes of the up matrix, and of the down one.

    Args:
        up: shape of the first matrix; see `NarrowMatrix`.
        down: shape of the second.
        form: of both.
        cold_dtype: of the option that had it rounded; `auto` is as the checkpoint has it.
        largest: from the largest numbers of parts of rows of the down matrix, `[N, rows, 1]`, those
            of the whole rows, of which other ranks have the other parts; None where they are whole.

    Attributes:
        name: for people.
        key: in `LAYOUTS`; equal for equal layouts.
        matrices: up and down.
        weight_bytes: of all planes.
        payload_bytes: from one expert to the next: whole pages.
    """

    def __init__(
        self,
        up: Shape,
        down: Shape,
        form: WeightFormat,
        *,
        cold_dtype: ColdDType = "auto",
        largest: Largest | None = None,
    ) -> None:
        self.form, self.cold_dtype = form, cold_dtype
        self._largest = largest
        self.name = form.name if cold_dtype == "auto" else cold_dtype
        first = NarrowMatrix.of(form, up)
        self.matrices = first, NarrowMatrix.of(form, down, first.end)
        self.weight_bytes = self.matrices[1].end
        self.payload_bytes = slot_bytes_for(self.weight_bytes)
        self.key = f"{form} {up} {down} {cold_dtype}"
        LAYOUTS[self.key] = self

    def quantise(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """`[N, *up]` and `[N, *down]` of any float dtype as `[N, payload_bytes]` uint8.

        Of the formats of `rounded_layout`.
        """
        payloads = torch.zeros(len(up), self.payload_bytes, dtype=torch.uint8, device=up.device)
        for matrix, weight in zip(self.matrices, (up, down), strict=True):
            codes, scales, _ = matrix.views(payloads)
            runs = weight.reshape(*scales.shape, -1).float()
            if self.form.code == "int4":
                places = runs.abs().argmax(-1, keepdim=True)
                scale = (runs.gather(-1, places) / -8).to(scales.dtype)
                divisor = scale.float().masked_fill(scale == 0, 1.0)
                numbers = ((runs / divisor).round() + 8).clamp(0, 15).to(torch.uint8)
                codes.copy_((numbers[..., ::2] | numbers[..., 1::2] << 4).view(codes.shape))
            else:
                # Not divided: PyTorch divides by a number on the CPU, and on a GPU multiplies.
                most = runs.abs().amax(-1, keepdim=True)
                if self._largest is not None and matrix is self.matrices[1]:
                    most = self._largest(most)
                scale = (most * (1 / _FP8_MAX)).clamp(min=_LEAST_SCALE)
                numbers = (runs / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
                codes.copy_(numbers.view(torch.uint8).view(codes.shape))
            scales.copy_(scale.squeeze(-1))
        return payloads

    def dequantise(self, payloads: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """`[N, payload_bytes]` uint8 as `[N, rows, columns]` up and down, by `widen`."""
        return [self.widen(which, payloads, dtype) for which in (0, 1)]

    def widen(self, which: int, payloads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The `[N, rows, columns]` up (0) or down (1) matrices of `[N, payload_bytes]` uint8."""
        matrix = self.matrices[which]
        wide = matrix.widened(payloads, dtype)
        return wide.reshape(len(payloads), -1, matrix.shape[-1])

    def write(self, which: int, part: int, payload: torch.Tensor, planes: Planes) -> None:
        """Put the up (0) or down (1) matrix, or a part of it, into one `[payload_bytes]` uint8."""
        matrix = self.matrices[which]
        has_parts = len(matrix.shape) == 3
        for view, plane in zip(matrix.views(payload), planes, strict=True):
            if view is not None and plane is not None:
                (view[part] if has_parts else view).copy_(plane)


def rounded_layout(
    up: Shape, down: Shape, dtype: NarrowDType, *, largest: Largest | None = None
) -> NarrowLayout:
    """How `expert_cold_dtype` keeps matrices of these shapes; `largest` as `NarrowLayout` has it.

    Raises:
        ConfigError: the sizes do not divide into groups.
    """
    if dtype == "fp8":
        return NarrowLayout(up, down, FP8_ROW, cold_dtype=dtype, largest=largest)
    group = math.gcd(up[-1], down[-1], INT4.columns or 0)
    if group < _LEAST_GROUP:
        raise ConfigError(
            f"expert_cold_dtype is int4, but rows of {up[-1]} and {down[-1]} values do not "
            f"divide into groups of {_LEAST_GROUP} or more; expected fp8 or auto"
        )
    return NarrowLayout(up, down, replace(INT4, columns=group), cold_dtype=dtype)


@dataclass(slots=True)
class RoundingError:
    """What rounding did to weights, all together.

    Attributes:
        error: sum of the squares of the errors.
        total: sum of the squares of the weights.
    """

    error: float = 0.0
    total: float = 0.0

    def add(self, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take in weights and what became of them."""
        exact = exact.float()
        difference = rounded.float() - exact
        self.error += float(difference.square().sum(dtype=torch.float64))
        self.total += float(exact.square().sum(dtype=torch.float64))


def relative_rms(errors: Iterable[RoundingError]) -> float:
    """Root of the mean square of all errors, over that of the weights; 0 where nothing is."""
    found = list(errors)
    total = sum(each.total for each in found)
    return math.sqrt(sum(each.error for each in found) / total) if total else 0.0


def quantise_into(
    layout: NarrowLayout,
    payloads: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    device: torch.device,
) -> RoundingError:
    """Round the experts of a layer into `payloads`, some experts at a time.

    Args:
        layout: of a payload.
        payloads: `[E, payload_bytes]` uint8. Mutated.
        up: `[E, *up]`, of any float dtype, on any device.
        down: `[E, *down]`, likewise.
        device: where to compute.
    """
    rounding = RoundingError()
    num_experts = max(1, _PIECE_VALUES // math.prod(up.shape[1:]))
    for start in range(0, len(up), num_experts):
        pieces = [weight[start : start + num_experts].to(device) for weight in (up, down)]
        narrow = layout.quantise(*pieces)
        for exact, rounded in zip(pieces, layout.dequantise(narrow, up.dtype), strict=True):
            rounding.add(exact, rounded)
        payloads[start : start + num_experts].copy_(narrow)
    return rounding
