"""Logits of a model over paged KV, with and without recorded steps."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hotset.attention.backend import AttentionBackend
from hotset.attention.gather import GatherBackend
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.executor.probe import ModelLayout, inspect_model
from hotset.executor.runner import ModelRunner
from hotset.memory.arena import DeviceArena
from hotset.memory.state_arena import StateArena
from hotset.request import SamplingParams
from hotset.sequence import Request


def gather(layout: ModelLayout) -> Callable[[DeviceArena], GatherBackend]:
    """Makes the backend that runs everywhere, for `paged_logits`."""
    return lambda arena: GatherBackend(arena, layout.layers)


def paged_logits(
    model: PreTrainedModel,
    layout: ModelLayout,
    make_backend: Callable[[DeviceArena], AttentionBackend],
    *,
    recorded: bool = False,
    can_record: bool = True,
    compiles: bool = True,
    scales: list[tuple[float, float]] | None = None,
    block_size: int = 4,
    as_rows: bool = False,
) -> list[torch.Tensor]:
    """Logits of steps of all kinds: prefill, chunks beside decodes, decodes.

    With `as_rows` by compiled code of a CPU.
    """
    arena = DeviceArena(
        layout.cache_specs,
        num_blocks=41,
        block_size=block_size,
        dtype=layout.kv_dtype,
        device=model.device,
        scales=scales,
        index_dims=layout.index_dims,
    )
    states = None
    if layout.states:
        states = StateArena(layout.states, num_slots=4, dtype=layout.dtype, device=model.device)
    runner = ModelRunner(
        model,
        arena,
        make_backend(arena),
        max_num_seqs=4,
        states=states,
        kv_layers=layout.kv_layers,
    )
    if recorded:
        if compiles:
            runner.compile(scratch_block=40)
        runner.record(max_num_tokens=64, max_context_blocks=15, scratch_block=40)
        assert (runner._graphs is not None) == can_record
    if as_rows:
        runner.compile_rows(layout, scratch_block=40)
        assert runner._program is not None
    first = Request("a", 45, list(range(3, 48)), SamplingParams(), 60)
    first.kv.block_table = [3, 1, 2, 5, 7, 6, 9, 8, 0, 10, 11, 12]
    second = Request("b", 10, list(range(60, 70)), SamplingParams(), 60)
    second.kv.block_table = [13, 14, 15]
    first.kv.state_write, second.kv.state_write = 2, 3
    steps = [
        [StepItem.of(second, 0, 9), StepItem.of(first, 0, 20)],
        [StepItem.of(first, 20, 24), StepItem.of(second, 9, 1)],
        [StepItem.of(first, 44, 1), StepItem.of(second, 9, 1)],
    ]
    logits = []
    for items in steps:
        logits.append(runner.forward(make_step_input(Step(items), block_size)).float().clone())
        for item in items:
            item.request.kv.state_read = item.request.kv.state_write
    return logits


def with_sinks(layout: ModelLayout, device: str = "cpu") -> ModelLayout:
    """The same with random sinks in each layer."""
    layers = [
        replace(layer, sinks=torch.randn(layer.num_heads, device=device)) for layer in layout.layers
    ]
    return replace(layout, layers=tuple(layers))


def check_on_a_gpu(
    model: PreTrainedModel,
    make_backend: Callable[[ModelLayout, DeviceArena], AttentionBackend],
    most: Callable[[float], float],
) -> None:
    """In bfloat16 a backend computes, launched and recorded, what SDPA does in float32.

    `most` bounds the difference, by that of SDPA in bfloat16.
    """
    model = model.to("cuda", torch.bfloat16)
    with torch.no_grad():  # attention that is not all or nothing
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1)
    layout = inspect_model(model)
    twin = deepcopy(model).float().cpu()
    exact_layout = inspect_model(twin)
    exact = paged_logits(twin, exact_layout, gather(exact_layout))
    expected = paged_logits(model, layout, gather(layout))
    for recorded in (False, True):
        got = paged_logits(
            model, layout, lambda arena: make_backend(layout, arena), recorded=recorded
        )
        for true, one, other in zip(exact, expected, got, strict=True):
            assert difference(true.cuda(), other) <= most(difference(true.cuda(), one))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the size of `one`; 0 for nothing in both."""
    return float((one - other).norm() / one.norm()) if len(one) or len(other) else 0.0
