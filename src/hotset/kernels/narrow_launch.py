"""What launches of kernels over narrow weights are given beside their addresses."""

from dataclasses import replace
from typing import Any

import torch
import triton
from torch.nn import functional

from hotset.cost.tuning import TUNINGS, Tile, Tiles
from hotset.kernels.fused_experts import shared_bytes
from hotset.kernels.narrow_forms import CODES, SCALES
from hotset.kernels.narrow_product import RUN_COLUMNS
from hotset.weight_format import WeightFormat


def planes_of(form: WeightFormat, matrix: Any) -> tuple[Any, ...]:
    """Code; where codes, scales and what is more begin; a group's columns; kind of scales; rows."""
    more = -1 if matrix.more is None else matrix.more.offset
    group = form.columns or triton.next_power_of_2(matrix.shape[-1])
    rows = form.rows or matrix.shape[-2]
    scale = SCALES[str(form.scale)]
    return CODES[form.code], matrix.codes.offset, matrix.scales.offset, more, group, scale, rows


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


def opens_in_pairs(form: WeightFormat, hidden: torch.Tensor) -> bool:
    """Whether codes are opened by PTX, and not by Triton's operations."""
    if hidden.device.type != "cuda":
        return False
    if form.code == "e2m1":
        return hidden.dtype == torch.bfloat16
    return form.code == "e4m3" or f"torch.{form.scale}" == str(hidden.dtype)


def narrow_tiles_for(
    num_rows: int, num_experts: int, form: WeightFormat, device: torch.device
) -> Tiles:
    """The tiles for `num_rows` rows of experts in `form` on this device; a linear layer is one."""
    tiles = TUNINGS[device.type].tiles(
        num_rows, num_experts, shared_bytes=shared_bytes(device), narrow=True
    )
    return replace(tiles, up=_suited(tiles.up, form), down=_suited(tiles.down, form))


def _suited(tile: Tile, form: WeightFormat) -> Tile:
    """With 8 warps, where each column of a tile has one scale of 16 bits.

    With fewer threads than two per scale Triton 3.6 has widened weights pass through shared memory.
    """
    is_wide = form.columns is None or form.columns >= tile.depth
    if is_wide and form.scale in ("bfloat16", "float16") and tile.columns >= 32 * tile.num_warps:
        return replace(tile, num_warps=8)
    return tile
