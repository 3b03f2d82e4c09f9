"""Checkpoints of 4-bit numbers of a table, with a scale for 64 of them: bitsandbytes (QLoRA).

N = rows of a weight, K = columns. `weight [N * K / 2, 1]` has two codes in a byte, the **higher**
half first, over the matrix as one run. Beside it are `weight.absmax`, the scales of blocks of that
run; `weight.quant_map`, the 16 numbers; and `weight.quant_state.bitsandbytes__nf4` (or `fp4`), JSON
as bytes. Scales that are quantised too (double quantisation) are bytes: numbers of
`weight.nested_quant_map`, times `weight.nested_absmax` of 256 of them, plus an offset. They are
opened to float32 once, which is what bitsandbytes multiplies by.
Source: `QuantState` and `dequantize_4bit` of bitsandbytes; arXiv 2305.14314.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from hotset.checkpoint.files import Stored
from hotset.errors import ModelError
from hotset.foreign_text import parse_json
from hotset.linear.narrow_matrix import of_table
from hotset.weight_format import TABLE_NUMBERS, WeightFormat

_STATE = ".weight.quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True)
class State:
    """What a weight's JSON says.

    Attributes:
        shape: `[N, K]`.
        block: codes that share a scale.
        nested_block: scales that share one; None where scales are floats.
        offset: of those.
    """

    shape: tuple[int, int]
    block: int
    nested_block: int | None
    offset: float

    @staticmethod
    def of(text: torch.Tensor) -> "State":
        """From `[bytes]` uint8; ValueError where it is not what bitsandbytes writes."""
        try:
            fields = parse_json(bytes(text.cpu().tolist()))
            rows, columns = (int(size) for size in fields["shape"])
            nested = fields.get("nested_blocksize")
            offset = float(fields["nested_offset"]) if nested is not None else 0.0
            return State((rows, columns), int(fields["blocksize"]), nested, offset)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its quant_state is not read: {error}") from error


def find_weights(
    folder: Path, stored: Mapping[str, Stored]
) -> tuple[dict[str, tuple[str, ...]], dict[str, State]]:
    """Name of a weight -> the names of its parts; and its state.

    Parts are codes, scales, table and state; of scales in bytes also their own scales and table.

    Raises:
        ModelError: some are missing, or of shapes that do not fit together.
    """
    found, states = {}, {}
    for name, tensor in stored.items():
        layer, mark, _ = name.partition(_STATE)
        if not mark:
            continue
        weight = f"{layer}.weight"
        with safetensors.safe_open(tensor.file, "pt") as file:
            try:
                state = State.of(file.get_tensor(name))
            except ValueError as error:
                raise ModelError(f"{folder}: {weight}: {error}") from error
        parts = [weight, f"{weight}.absmax", f"{weight}.quant_map", name]
        if state.nested_block is not None:
            parts += [f"{weight}.{each}" for each in _NESTED]
        _check(folder, state, parts, stored)
        found[weight], states[weight] = tuple(parts), state
    return found, states


def _check(folder: Path, state: State, parts: list[str], stored: Mapping[str, Stored]) -> None:
    num_codes = state.shape[0] * state.shape[1]
    num_scales = -(-num_codes // state.block)
    is_nested = state.nested_block is not None
    expected: dict[str, tuple[str, int]] = {
        parts[0]: ("U8", -(-num_codes // 2)),
        parts[1]: ("U8" if is_nested else "F32", num_scales),
        parts[2]: ("F32", TABLE_NUMBERS),
    }
    if state.nested_block is not None:
        expected[parts[4]] = ("F32", -(-num_scales // state.nested_block))
        expected[parts[5]] = ("F32", 256)
    for part, (dtype, count) in expected.items():
        has = stored.get(part)
        size = None if has is None else torch.Size(has.shape).numel()
        if has is None or has.dtype != dtype or size != count:
            is_there = "missing" if has is None else f"{has.dtype} {list(has.shape)}"
            raise ModelError(
                f"{folder}: {part} is {is_there}, expected {dtype} with {count:,} numbers for a "
                f"weight of {list(state.shape)} in blocks of {state.block} (bitsandbytes)"
            )


def format_of(states: Mapping[str, State]) -> WeightFormat | None:
    """How weights stay narrow; None where blocks differ, or do not end with rows."""
    blocks = {state.block for state in states.values()}
    is_whole = all(state.shape[1] % state.block == 0 for state in states.values())
    if len(blocks) != 1 or not is_whole:
        return None
    return WeightFormat("table4", "float32", 1, blocks.pop())


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    state: torch.Tensor,
    *nested: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`[N, K]` of `dtype`, computed in float32; see `find_weights` for the parts."""
    of = State.of(state)
    values = of_table(table, _swapped(codes))[: of.shape[0] * of.shape[1]]
    factors = _scales(scales, of, nested)
    return values.mul_(factors.repeat_interleave(of.block)[: len(values)]).view(of.shape).to(dtype)


def planes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    state: torch.Tensor,
    *nested: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[N, K / 2]`, scales `[N, K / block]` in float32, and the table; `weight_format`."""
    of = State.of(state)
    num_rows = of.shape[0]
    factors = _scales(scales, of, nested)
    return _swapped(codes).view(num_rows, -1), factors.view(num_rows, -1), table


def _swapped(codes: torch.Tensor) -> torch.Tensor:
    """`[bytes]`, the lower half first."""
    flat = codes.reshape(-1)
    return flat >> 4 | flat << 4


def _scales(scales: torch.Tensor, state: State, nested: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if state.nested_block is None:
        return scales
    of_scales, table = nested
    opened = table[scales.int()]
    opened *= of_scales.repeat_interleave(state.nested_block)[: len(opened)]
    return opened + state.offset
