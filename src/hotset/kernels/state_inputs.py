"""What kernels of recurrences are given: numbers of tokens, and the slots that a step uses.

T = tokens of a step, N = slots, H = heads, G = heads of keys (H is a multiple), V = values, K =
keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class DeltaTokens:
    """Of the gated delta rule; of each tensor all but tokens is contiguous, see `in_rows`.

    Attributes:
        query: `[T, G, K]`.
        key: `[T, G, K]`.
        value: `[T, H, V]`.
        decay: `[T, H]`, logarithm of what the state is multiplied with, or `[T, H, K]`, where it is
            another for each key.
        beta: `[T, H]`, how much of the new value replaces the old one.
        normalises: whether queries and keys are brought to length 1.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor
    normalises: bool


@dataclass(frozen=True, slots=True)
class Mamba2Tokens:
    """Of Mamba-2; of each tensor all but tokens is contiguous, see `in_rows`.

    Attributes:
        value: `[T, H, V]`, x of the paper.
        step: `[T, H]`, the time step before bias, softplus and bounds.
        rate: `[H]`, A of the paper, negative.
        key: `[T, G, K]`, B of the paper.
        query: `[T, G, K]`, C of the paper.
        skip: `[H]`, D of the paper; None for none.
        bias: `[H]`, of the time step; None for none.
        is_softplus: whether the time step goes through softplus.
        bounds: of the time step.
    """

    value: torch.Tensor
    step: torch.Tensor
    rate: torch.Tensor
    key: torch.Tensor
    query: torch.Tensor
    skip: torch.Tensor | None
    bias: torch.Tensor | None
    is_softplus: bool
    bounds: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Mamba1Tokens:
    """Of Mamba-1, each value of which decays by steps of its own; see `in_rows`.

    Attributes:
        value: `[T, V]`, x of the paper.
        step: `[T, V]`, the time step before bias and softplus.
        rate: `[V, K]`, A of the paper, negative; contiguous.
        key: `[T, K]`, B of the paper.
        query: `[T, K]`, C of the paper.
        gate: `[T, V]`, whose SiLU the output is multiplied with; None for none.
        skip: `[V]`, D of the paper; None for none.
        bias: `[V]`, of the time step; None for none.
        is_softplus: whether the time step goes through softplus.
    """

    value: torch.Tensor
    step: torch.Tensor
    rate: torch.Tensor
    key: torch.Tensor
    query: torch.Tensor
    gate: torch.Tensor | None
    skip: torch.Tensor | None
    bias: torch.Tensor | None
    is_softplus: bool


class RowTable(NamedTuple):
    """Of each token of a step, `[T]` int32. No two sequences write one slot, or read and write one.

    Attributes:
        reads: the slot that its sequence reads.
        writes: the slot that a sequence of this one token writes; `IN_CHUNKS` for tokens of longer
            ones, `NO_SEQUENCE` for rows of none.
        before: how many tokens of its sequence come before it in this step.
    """

    reads: torch.Tensor
    writes: torch.Tensor
    before: torch.Tensor


class ChunkTable(NamedTuple):
    """Of each of the C chunks that the longer sequences are computed in, `[C]` int32.

    Attributes:
        starts: its first token.
        lengths: how many tokens it has, at most 64; 0 is no chunk, or one that writes once more.
        writes: the slot for the state after it; -1 for none.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    writes: torch.Tensor


class SequenceTable(NamedTuple):
    """Of each of the S sequences of more than one token, `[S]` int32.

    Attributes:
        reads: the slot for its state before the step.
        firsts: its first chunk.
        ends: the chunk behind its last; `firsts` where there is no sequence.
    """

    reads: torch.Tensor
    firsts: torch.Tensor
    ends: torch.Tensor


class StepTables(NamedTuple):
    """A step's tables, on the device of the states."""

    rows: RowTable
    chunks: ChunkTable
    sequences: SequenceTable


def in_rows(numbers: torch.Tensor) -> torch.Tensor:
    """`[T, ...]` with all but tokens contiguous: itself, or a copy."""
    return numbers if numbers[0].is_contiguous() else numbers.contiguous()
