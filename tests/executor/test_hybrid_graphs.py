"""Recorded steps of models with a state: FlashInfer and CUDA graphs are fakes on the CPU."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from fake_flashinfer import CpuFlashInfer, FakeRecorder, do
from paged import gather, paged_logits
from tiny_models import make_model

from hotset.attention import state_kernels, state_step, state_tables
from hotset.attention.backend import AttentionBackend
from hotset.cost.tuning import TUNINGS
from hotset.executor import graphs as graphs_module
from hotset.executor.probe import inspect_model
from hotset.memory.arena import DeviceArena

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU: see test_gpu_hybrids.py"
)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on the CPU, which a tape runs when it is replayed."""

    def noted(kernel: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **options: do(lambda: kernel(*args, **options))

    few = replace(TUNINGS["cpu"], decode_sizes=(3,), mixed_sizes=(32,))
    monkeypatch.setattr(graphs_module, "TUNINGS", {"cpu": few})
    monkeypatch.setattr(graphs_module, "GraphRecorder", FakeRecorder)
    monkeypatch.setattr(state_tables, "_MOST_PROMPTS", 2)
    monkeypatch.setattr(state_step, "has_kernels", lambda device: True)
    monkeypatch.setattr(state_kernels, "convolve", noted(state_kernels.convolve))
    for scan, kernels in state_kernels.KERNELS.items():
        monkeypatch.setitem(state_kernels.KERNELS, scan, tuple(map(noted, kernels)))


@pytest.mark.parametrize(
    ("family", "changes", "records_prompts"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}, True),
        ("falcon_h1", {"num_hidden_layers": 1}, False),  # of both kinds at once
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}, False),
    ],
)
def test_a_hybrid_computes_launched_and_recorded_what_pytorch_does(
    family: str,
    changes: dict[str, Any],
    records_prompts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(family, **{"num_hidden_layers": 2, **changes})
    layout = inspect_model(model)  # also tries the kernels
    with monkeypatch.context() as patched:
        patched.setattr(state_step, "has_kernels", lambda device: False)
        expected = paged_logits(model, layout, gather(layout))

    def backend(arena: DeviceArena) -> AttentionBackend:
        return CpuFlashInfer(arena, layout.layers, records_prompts=records_prompts)

    for recorded in (False, True):
        got = paged_logits(model, layout, backend, recorded=recorded, compiles=False)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
