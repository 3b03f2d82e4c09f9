"""The engine on an NVIDIA GPU: run these there with `pytest -m gpu`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import reference, run
from test_greedy_equality import make_prompts
from tiny_models import make_model

from hotset.engine.engine import Engine
from hotset.memory.arena import DeviceArena
from hotset.model.flashinfer_attention import FlashInferBackend
from hotset.model.runner import GatherBackend, ModelRunner, inspect_model
from hotset.request import Request, SamplingParams, StepItem, StepPlan

MakeEngine = Callable[..., Engine]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("tiers", [{}, {"hot_blocks": 26, "host_blocks": 300}])
def test_greedy_tokens_are_those_of_transformers(
    family: str, tiers: dict[str, Any], make_engine: MakeEngine
) -> None:
    prompts = make_prompts()
    engine = make_engine(family, device="cuda", max_num_batched_tokens=32, **tiers)
    for _ in range(2):
        assert run(engine, prompts) == reference(family, prompts)
    if tiers:
        assert engine.metrics.preemptions > 0
        assert engine.metrics.cached_tokens["host"] > 0


@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral", "gemma2"])
def test_flashinfer_attends_as_sdpa_does(family: str) -> None:
    model = make_model(family, head_dim=64).to("cuda", torch.bfloat16)
    layout = inspect_model(model)
    logits = []
    for make_backend in (GatherBackend, lambda arena: FlashInferBackend(arena, layout.layers)):
        arena = DeviceArena(
            layout.kv_shapes,
            num_blocks=40,
            block_size=4,
            dtype=layout.dtype,
            device=torch.device("cuda"),
        )
        runner = ModelRunner(model, arena, make_backend(arena))
        first = Request("a", 45, list(range(3, 48)), SamplingParams(), 60)
        first.block_table = [3, 1, 2, 5, 7, 6, 9, 8, 0, 10, 11, 12]
        second = Request("b", 10, list(range(60, 70)), SamplingParams(), 60)
        second.block_table = [13, 14, 15]
        steps = [
            [StepItem(second, 0, 9), StepItem(first, 0, 20)],
            [StepItem(first, 20, 24)],
            [StepItem(first, 44, 1), StepItem(second, 9, 1)],
        ]
        for items in steps:
            out = runner.forward(StepPlan(items))
        logits.append(out.float())
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < 2e-2, error  # bfloat16 rounding
