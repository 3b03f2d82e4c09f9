"""Steps over slots for states: their spans, and slots of random numbers."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from hotset.attention.batch import Batch, SequenceSpan
from hotset.attention.scans import Scan
from hotset.cost.cache_spec import State
from hotset.memory.state_arena import StateArena

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYER, CHANNELS, KERNEL, SLOTS = 3, 150, 4, 20


def spans_of(*parts: tuple[Any, ...]) -> list[SequenceSpan]:
    """Spans of (tokens, position of the first, slot read, slot written, cuts)."""
    spans, row = [], 0
    for count, position, read, write, *cuts in parts:
        spans.append(SequenceSpan(row, count, position + count, [], read, write, cuts))
        row += count
    return spans


# Decodes from zeros, in place, and to another slot and one more; texts from zeros, in place, from
# within a chunk, cut on and off the grid and at their end, and shorter than the convolution.
MIXED = spans_of(
    (1, 5, 0, 2),
    (1, 70, 3, 3),
    (1, 9, 4, 5, (1, 6)),
    (2, 0, 0, 7),
    (3, 63, 8, 8),
    (150, 0, 0, 9, (64, 10), (128, 11), (149, 12)),
    (70, 40, 13, 14, (24, 15), (70, 16)),
)


def batch_of(spans: list[SequenceSpan]) -> Batch:
    none = np.empty((6, 0), np.int64)
    num_decodes = sum(span.num_tokens == 1 for span in spans)
    return Batch(none, none[0], none[0], spans, num_decodes, False)


def tokens_of(spans: list[SequenceSpan]) -> int:
    return sum(span.num_tokens for span in spans)


def make_arena(scan: Scan, dtype: torch.dtype) -> StateArena:
    """Slots of random numbers, but for the slot of zeros."""
    spec = State(scan.state_shape, (CHANNELS, KERNEL - 1), dtype.itemsize)
    arena = StateArena({LAYER: spec}, num_slots=SLOTS, dtype=dtype, device=DEVICE)
    arena.recurrent[LAYER][1:] = torch.randn(SLOTS - 1, *scan.state_shape)
    arena.columns[LAYER][1:] = torch.randn(SLOTS - 1, *spec.conv).to(dtype)
    return arena


def twin(arena: StateArena, scan: Scan, dtype: torch.dtype) -> StateArena:
    other = make_arena(scan, dtype)
    other.memory.copy_(arena.memory)
    return other


def cast(scan: Scan, dtype: torch.dtype) -> Scan:
    """On the device, with queries, keys, values and gates of `dtype`."""
    changes: dict[str, torch.Tensor] = {}
    for field in fields(scan):  # type: ignore[arg-type]
        if isinstance(numbers := getattr(scan, field.name), torch.Tensor):
            is_token = field.name in ("query", "key", "value", "gate")
            changes[field.name] = numbers.to(DEVICE, dtype if is_token else torch.float32)
    return replace(scan, **changes)  # type: ignore[type-var]


def rows_of(scan: Scan, rows: slice) -> Scan:
    """The same of some of its tokens."""
    taken = {id(each) for each in scan.rows}
    named = {field.name: getattr(scan, field.name) for field in fields(scan)}  # type: ignore[arg-type]
    changes = {name: each[rows] for name, each in named.items() if id(each) in taken}
    return replace(scan, **changes)  # type: ignore[type-var]
