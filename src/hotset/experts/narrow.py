"""Experts in fewer bits than they are computed with, for less memory and less to move.

A run of values along the last dimension of a weight, as it is stored, shares a scale:
  fp8 -- 8-bit floats (e4m3), a float32 scale for each row, which its largest value fits.
  int4 -- -8 to 7, two in a byte, a bfloat16 scale for each group of 64 values. The scale has the
    sign that gives the value of largest magnitude -8: all 16 numbers are used, and there is no
    offset to store. Source: Q4_0 of GGML, which has groups of 32; with 64 the scales are 6 % of the
    bytes and not 11.

A value is that number times its scale in float32, rounded once to the dtype of the weights. So it
is the same bits wherever it is computed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from hotset.errors import ConfigError
from hotset.memory.disk.slab import slot_bytes_for

NarrowDType = Literal["fp8", "int4"]

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_LEAST_SCALE = 1e-12  # of a row of zeros
_INT4_GROUP = 64
_LEAST_GROUP = 8
_ALIGN_BYTES = 16  # of what the device reads at once
_PIECE_VALUES = 2**26


@dataclass(frozen=True, slots=True)
class NarrowMatrix:
    """One matrix within a payload.

    Attributes:
        shape: of the matrix.
        run: values that share a scale, next to each other.
        run_bytes: of these.
        values_at: byte of the payload where values begin.
        scales_at: byte where scales begin, one for each run.
    """

    shape: tuple[int, int]
    run: int
    run_bytes: int
    values_at: int
    scales_at: int

    @property
    def num_runs(self) -> int:
        """Runs of the matrix."""
        return math.prod(self.shape) // self.run


class NarrowLayout:
    """One expert in few bits as a run of bytes: values up and down, then scales up and down.

    Args:
        up: shape of the first matrix.
        down: shape of the second.
        dtype: of the numbers.

    Attributes:
        scale_dtype: of scales.
        matrices: up and down.
        payload_bytes: from one expert to the next: whole pages.

    Raises:
        ConfigError: the sizes do not divide into groups.
    """

    def __init__(self, up: tuple[int, int], down: tuple[int, int], dtype: NarrowDType) -> None:
        self.dtype = dtype
        self.is_int4 = dtype == "int4"
        self.scale_dtype = torch.bfloat16 if self.is_int4 else torch.float32
        group = math.gcd(up[1], down[1], _INT4_GROUP)
        if self.is_int4 and group < _LEAST_GROUP:
            raise ConfigError(
                f"expert_cold_dtype is int4, but rows of {up[1]} and {down[1]} values do not "
                f"divide into groups of {_LEAST_GROUP} or more; expected fp8 or auto"
            )
        runs = [(shape, group if self.is_int4 else shape[1]) for shape in (up, down)]
        places, end = [], 0
        for bytes_of in (self._run_bytes, lambda run: self.scale_dtype.itemsize):
            for shape, run in runs:
                places.append(end)
                num_bytes = math.prod(shape) // run * bytes_of(run)
                end += -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self.matrices = tuple(
            NarrowMatrix(shape, run, self._run_bytes(run), places[i], places[2 + i])
            for i, (shape, run) in enumerate(runs)
        )
        self.payload_bytes = slot_bytes_for(end)

    def quantise(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """`[N, *up]` and `[N, *down]` of any float dtype as `[N, payload_bytes]` uint8."""
        payloads = torch.zeros(len(up), self.payload_bytes, dtype=torch.uint8, device=up.device)
        for matrix, weight in zip(self.matrices, (up, down), strict=True):
            values, scales = self._views(payloads, matrix)
            runs = weight.reshape(len(weight), matrix.num_runs, matrix.run).float()
            if self.is_int4:
                places = runs.abs().argmax(-1, keepdim=True)
                scale = (runs.gather(-1, places) / -8).to(self.scale_dtype)
                divisor = scale.float().masked_fill(scale == 0, 1.0)
                numbers = ((runs / divisor).round() + 8).clamp(0, 15).to(torch.uint8)
                low, high = numbers.chunk(2, -1)
                values.copy_(low | high << 4)
            else:
                # Not divided: PyTorch divides by a number on the CPU, and on a GPU multiplies.
                scale = (runs.abs().amax(-1, keepdim=True) * (1 / _FP8_MAX)).clamp(min=_LEAST_SCALE)
                numbers = (runs / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
                values.copy_(numbers.view(torch.uint8))
            scales.copy_(scale.squeeze(-1))
        return payloads

    def dequantise(self, payloads: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """`[N, payload_bytes]` uint8 as `[N, *up]` and `[N, *down]` of `dtype`.

        Reference of `kernels.dequantise_experts`, bit-exact.
        """
        weights = []
        for matrix in self.matrices:
            values, scales = self._views(payloads, matrix)
            if self.is_int4:
                numbers = torch.cat([values & 15, values >> 4], -1).float() - 8
            else:
                numbers = values.view(_FP8).float()
            weight = numbers * scales.float().unsqueeze(-1)
            weights.append(weight.to(dtype).view(len(payloads), *matrix.shape))
        return weights

    def _views(
        self, payloads: torch.Tensor, matrix: NarrowMatrix
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N, num_runs, run_bytes]` uint8 values and `[N, num_runs]` scales, views."""
        num_bytes = matrix.num_runs * matrix.run_bytes
        values = payloads[:, matrix.values_at : matrix.values_at + num_bytes]
        first = matrix.scales_at // self.scale_dtype.itemsize
        scales = payloads.view(self.scale_dtype)[:, first : first + matrix.num_runs]
        return values.unflatten(1, (matrix.num_runs, matrix.run_bytes)), scales

    def _run_bytes(self, run: int) -> int:
        return run // 2 if self.is_int4 else run


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
