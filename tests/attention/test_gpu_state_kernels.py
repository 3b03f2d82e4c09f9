"""Kernels over slots in a CUDA graph: what a replay computes is what a launch does, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from scans import gated_delta, kimi_delta, mamba1, mamba2
from slots import (
    CHANNELS,
    KERNEL,
    LAYER,
    MIXED,
    batch_of,
    cast,
    make_arena,
    rows_of,
    spans_of,
    tokens_of,
    twin,
)

from hotset.attention.scans import Convolution, Scan
from hotset.attention.state_kernels import KernelStates
from hotset.attention.state_tables import TableSizes

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SIZE = 320
STEPS = [
    MIXED,
    spans_of((1, 8, 2, 2), (1, 80, 3, 3)),
    spans_of((1, 9, 2, 6), (200, 64, 10, 11)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gated_delta, kimi_delta, mamba1, mamba2])
def test_a_replay_computes_what_a_launch_does(
    make: Callable[[int], Scan], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    scan = cast(make(SIZE), dtype)
    values = torch.randn(CHANNELS, SIZE, device=DEVICE).to(dtype)
    weight = torch.randn(CHANNELS, KERNEL, device=DEVICE).to(dtype)
    arena = make_arena(scan, dtype)
    other = twin(arena, scan, dtype)
    states = KernelStates.of_padding(
        arena, TableSizes.of_recorded(SIZE, 8, is_decode=False), DEVICE
    )

    def compute(states: KernelStates, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        columns = states.convolve(LAYER, Convolution(values[:, :num], weight, None, "silu"))
        return columns, states.scan(LAYER, rows_of(scan, slice(num)))

    compute(states, SIZE)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = compute(states, SIZE)
    for spans in STEPS:
        num_tokens = tokens_of(spans)
        assert states.fill(batch_of(spans))
        graph.replay()
        states.finish()
        launched_states = KernelStates.of_batch(other, batch_of(spans), DEVICE)
        launched = compute(launched_states, num_tokens)
        launched_states.finish()
        assert torch.equal(recorded[0][:, :num_tokens], launched[0])
        assert torch.equal(recorded[1][:num_tokens], launched[1])
        assert recorded[1].isfinite().all()
        # The slot of padding has what padding left.
        assert torch.equal(arena.memory[2:], other.memory[2:])
        assert not arena.memory[0].any()
