"""What launches of kernels over narrow weights are given beside their addresses."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch.nn import functional

from hotset.cost.tuning import TUNINGS, Tiles
from hotset.kernels.eight_bit import round_rows
from hotset.kernels.fused_experts import shared_bytes
from hotset.kernels.narrow_forms import CODES, SCALES
from hotset.kernels.narrow_product import RUN_COLUMNS
from hotset.weight_format import WeightFormat


def planes_of(form: WeightFormat, matrix: Any) -> tuple[Any, ...]:
    """What kernels know a matrix by.

    Its code; where codes, scales and what is more begin; a group's columns; the kind of its scales;
    its rows; groups that share a scale, 0 where they have no factors; parts of a scale.
    """
    more = -1 if matrix.more is None else matrix.more.offset
    group = form.columns or triton.next_power_of_2(matrix.shape[-1])
    rows = form.rows or matrix.shape[-2]
    scale = SCALES[str(form.scale)]
    shared = 0 if form.span is None else form.span // group
    places = matrix.codes.offset, matrix.scales.offset, more
    return CODES[form.code], *places, group, scale, rows, shared, form.num_parts


def whole_runs(columns: int) -> int:
    """`columns`, up to whole runs."""
    return -(-columns // RUN_COLUMNS) * RUN_COLUMNS


def in_runs(hidden: torch.Tensor) -> torch.Tensor:
    """`[T, H]` to `[T, whole runs]`, each in the order of `in_order`; zeros at the end."""
    num_tokens, size = hidden.shape
    if size != whole_runs(size):
        hidden = functional.pad(hidden, (0, whole_runs(size) - size))
    runs = hidden.view(num_tokens, -1, 4, 2, 2, 2, 2).permute(0, 1, 6, 3, 4, 2, 5)
    return runs.reshape(num_tokens, -1)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows as a product reads them.

    Attributes:
        values: `[R, width]`, in the order of its columns; or 8-bit floats.
        scales: `[R, groups]` float32 of 8-bit floats.
    """

    values: torch.Tensor
    scales: torch.Tensor | None

    @property
    def num_scales(self) -> int:
        """Of a row."""
        return 0 if self.scales is None else self.scales.shape[1]


def as_inputs(x: torch.Tensor, form: WeightFormat) -> Inputs:
    """`[R, K]` floats for a product with a weight in `form`."""
    if form.input_bits == 8:
        return Inputs(*round_rows(x, form.columns))
    return Inputs(in_runs(x) if form.code_bits == 4 else x, None)


def opens_in_pairs(form: WeightFormat, hidden: torch.Tensor) -> bool:
    """Whether codes are opened by PTX, and not by Triton's operations."""
    return hidden.device.type == "cuda" and (form.code != "e2m1" or hidden.dtype == torch.bfloat16)


def narrow_tiles_for(
    num_rows: int, num_experts: int, form: WeightFormat, device: torch.device
) -> Tiles:
    """The tiles for `num_rows` rows of experts in `form` on this device; a linear layer is one."""
    tiles = TUNINGS[device.type].tiles(
        num_rows, num_experts, shared_bytes=shared_bytes(device), kind=kind_of(form)
    )
    if form.input_bits == 16 or form.columns is None:
        return tiles
    depth = form.columns  # no more than one scale
    up = replace(tiles.up, depth=min(depth, tiles.up.depth))
    return replace(tiles, up=up, down=replace(tiles.down, depth=min(depth, tiles.down.depth)))


def kind_of(form: WeightFormat) -> str:
    """What a `Tuning` knows the tiles of a format by."""
    return f"{form.code} x 8" if form.input_bits == 8 else form.code
