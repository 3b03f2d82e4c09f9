"""Kernels over slots against PyTorch's operations; Triton's interpreter where there is no GPU."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from exact_scans import exactly  # noqa: E402
from scans import gated_delta, kimi_delta, mamba1, mamba2  # noqa: E402
from slots import (  # noqa: E402
    CHANNELS,
    KERNEL,
    LAYER,
    MIXED,
    SLOTS,
    batch_of,
    cast,
    make_arena,
    rows_of,
    spans_of,
    tokens_of,
    twin,
)

from hotset.attention.batch import SequenceSpan  # noqa: E402
from hotset.attention.scans import Convolution, Scan  # noqa: E402
from hotset.attention.state_kernels import KernelStates  # noqa: E402
from hotset.attention.state_step import TorchStates  # noqa: E402
from hotset.memory.state_arena import StateArena  # noqa: E402

SCANS = pytest.mark.parametrize("make", [gated_delta, kimi_delta, mamba1, mamba2])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ODD = {"keys": 24, "values": 40, "heads": 3, "groups": 1}
# The interpreter is slow, and multiplies both dtypes in one way.
SIZES = [(torch.float32, ODD), (torch.bfloat16, {})]
# Where bits are compared with the kernels' own, two heads do: heads are programs of their own.
FEW = {"heads": 2, "groups": 1}
if DEVICE.type == "cuda":
    SIZES += [(torch.float32, {}), (torch.bfloat16, ODD)]


def check_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Up to the rounding of sums as large as the largest number."""
    # In 16 bits kernels multiply in TF32, on a GPU.
    rtol, part = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 3e-3)
    atol = part * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@SCANS
@pytest.mark.parametrize(("dtype", "sizes"), SIZES)
def test_a_step_scans_as_pytorch_does_and_leaves_the_same_states(
    make: Callable[..., Scan], dtype: torch.dtype, sizes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    scan = cast(make(tokens_of(MIXED), **sizes), dtype)
    arena = make_arena(scan, dtype)
    other = twin(arena, scan, dtype)
    expected = TorchStates(other, batch_of(MIXED), DEVICE).scan(LAYER, scan)
    states = KernelStates.of_batch(arena, batch_of(MIXED), DEVICE)
    check_close(states.scan(LAYER, scan), expected, dtype)
    states.finish()
    slots, others = arena.recurrent[LAYER], other.recurrent[LAYER]
    check_close(slots, others, dtype)
    kept = [slot for slot in range(SLOTS) if slot not in written(MIXED)]
    assert torch.equal(slots[kept], others[kept])


@SCANS
@DTYPES
def test_a_scan_is_as_exact_as_its_numbers(make: Callable[..., Scan], dtype: torch.dtype) -> None:
    """By the size of all errors together. In 16 bits outputs are rounded, and products in TF32."""
    torch.manual_seed(5)
    scan = cast(make(150, **FEW), dtype)
    arena = make_arena(scan, dtype)
    expected, state = exactly(scan, arena.recurrent[LAYER][2])
    spans = spans_of((149, 0, 2, 3)), spans_of((1, 149, 3, 3))  # a text, and a token behind it
    outputs = []
    for rows, part in zip((slice(149), slice(149, 150)), spans, strict=True):
        states = KernelStates.of_batch(arena, batch_of(part), DEVICE)
        outputs.append(states.scan(LAYER, rows_of(scan, rows)))
    most = 1e-5 if dtype == torch.float32 else 2**-7
    for found, exact in ((torch.cat(outputs), expected), (arena.recurrent[LAYER][3], state)):
        assert (found.double() - exact).norm() <= most * exact.norm()


def written(spans: list[SequenceSpan]) -> set[int]:
    return {s.state_write for s in spans} | {slot for s in spans for _, slot in s.cuts}


@DTYPES
@pytest.mark.parametrize("activation", ["silu", None, "gelu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_step_convolves_as_pytorch_does_and_leaves_the_same_columns(
    dtype: torch.dtype, activation: str | None, has_bias: bool
) -> None:
    torch.manual_seed(1)
    scan = gated_delta(1)
    arena = make_arena(scan, dtype)
    other = twin(arena, scan, dtype)
    values = torch.randn(tokens_of(MIXED), 2 * CHANNELS, device=DEVICE).to(dtype)
    values = values[:, CHANNELS:].T  # part of a projection
    weight = torch.randn(CHANNELS, KERNEL, device=DEVICE).to(dtype)
    bias = torch.randn(CHANNELS, device=DEVICE).to(dtype) if has_bias else None
    asked = (LAYER, Convolution(values, weight, bias, activation))
    expected = TorchStates(other, batch_of(MIXED), DEVICE).convolve(*asked)
    states = KernelStates.of_batch(arena, batch_of(MIXED), DEVICE)
    found = states.convolve(*asked)
    states.finish()
    check_close(found, expected, dtype)
    assert found.T.is_contiguous()  # which scans want of their rows
    assert torch.equal(arena.columns[LAYER], other.columns[LAYER])


def steps_of(ends: list[int], slots: list[int]) -> list[SequenceSpan]:
    """A text in steps, each in place but the first."""
    starts = [0, *ends[:-1]]
    return [
        SequenceSpan(0, end - start, end, [], read, write)
        for start, end, read, write in zip(starts, ends, [0, *slots[:-1]], slots, strict=True)
    ]


def run_steps(
    arena: StateArena, scan: Scan, values: torch.Tensor, steps: list[SequenceSpan]
) -> list[torch.Tensor]:
    """What a text's tokens come to, step by step: of the scan, and of the convolution."""
    found, weight = [], torch.ones(CHANNELS, KERNEL, device=DEVICE, dtype=values.dtype)
    for span in steps:
        own = slice(span.context_len - span.num_tokens, span.context_len)
        states = KernelStates.of_batch(arena, batch_of([span]), DEVICE)
        part = rows_of(scan, own)
        columns = states.convolve(LAYER, Convolution(values[:, own], weight, None, "silu"))
        found.append((states.scan(LAYER, part), columns.T))
        states.finish()
    return [torch.cat(part) for part in zip(*found, strict=True)]


@SCANS
@pytest.mark.parametrize("dtype", sorted({dtype for dtype, _ in SIZES[1:]}, key=str))
def test_cuts_on_the_grid_and_other_slots_change_no_bit(
    make: Callable[..., Scan], dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    scan = cast(make(150, **FEW), dtype)
    values = torch.randn(CHANNELS, 150, device=DEVICE).to(dtype)
    arena = make_arena(scan, dtype)
    whole = run_steps(arena, scan, values, steps_of([150], [2]))
    for ends, slots in ([64, 128, 150], [3, 3, 3]), ([64, 150], [4, 5]), ([128, 150], [6, 7]):
        cut = run_steps(arena, scan, values, steps_of(ends, slots))
        assert all(map(torch.equal, whole, cut))
        for pool in (arena.recurrent[LAYER], arena.columns[LAYER]):
            assert torch.equal(pool[2], pool[slots[-1]])
    # The same states as kept on the way.
    span = SequenceSpan(0, 150, 150, [], 0, 8, [(64, 9), (128, 10)])
    kept = run_steps(arena, scan, values, [span])
    assert all(map(torch.equal, whole, kept))
    for pool in (arena.recurrent[LAYER], arena.columns[LAYER]):
        assert torch.equal(pool[9], pool[4]) and torch.equal(pool[10], pool[6])


@SCANS
def test_a_token_is_the_same_in_all_bits_alone_and_beside_others(
    make: Callable[..., Scan],
) -> None:
    torch.manual_seed(3)
    scan = cast(make(tokens_of(MIXED), **FEW), torch.float32)
    arena = make_arena(scan, torch.float32)
    other = twin(arena, scan, torch.float32)
    together = KernelStates.of_batch(arena, batch_of(MIXED), DEVICE).scan(LAYER, scan)
    for span in MIXED:
        own = slice(span.start, span.start + span.num_tokens)
        part = rows_of(scan, own)
        alone = KernelStates.of_batch(other, batch_of([span._replace(start=0)]), DEVICE)
        assert torch.equal(alone.scan(LAYER, part), together[own])


def test_equal_keys_that_are_replaced_at_once_leave_finite_states() -> None:
    """Where the powers of what is solved for would grow beyond all digits."""
    torch.manual_seed(4)
    scan: Any = cast(gated_delta(128), torch.float32)
    scan = replace(
        scan,
        key=scan.key[:1].expand(128, -1, -1).contiguous(),
        decay=torch.zeros_like(scan.decay),
        beta=torch.ones_like(scan.beta),
    )
    arena = make_arena(scan, torch.float32)
    other = twin(arena, scan, torch.float32)
    batch = batch_of(spans_of((128, 0, 0, 2)))
    found = KernelStates.of_batch(arena, batch, DEVICE).scan(LAYER, scan)
    expected = TorchStates(other, batch, DEVICE).scan(LAYER, scan)
    check_close(found, expected, torch.float32)
