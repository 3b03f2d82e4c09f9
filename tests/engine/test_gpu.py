"""The engine on an NVIDIA GPU: run these there with `pytest -m gpu`."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from engines import make_prompts, reference, run
from paged import difference, gather, paged_logits, with_sinks
from tiny_models import make_model
from transformers.models.llama.modeling_llama import LlamaMLP

from hotset.attention.flashinfer.backend import FlashInferBackend
from hotset.engine.engine import Engine
from hotset.executor.probe import inspect_model
from hotset.memory.arena import DeviceArena

MakeEngine = Callable[..., Engine]
# Compiling float32 warns that it could be less exact.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("tiers", [{}, {"hot_blocks": 26, "host_blocks": 300}])
def test_greedy_tokens_are_those_of_transformers(
    family: str, tiers: dict[str, Any], make_engine: MakeEngine
) -> None:
    prompts = make_prompts()
    engine = make_engine(family, device="cuda", eager=True, max_num_batched_tokens=32, **tiers)
    engine.scheduler.ahead_tokens = 1  # so that many are preempted
    expected = reference(family, prompts, device="cuda")
    for _ in range(2):
        assert run(engine, prompts) == expected
    if tiers:
        assert engine.metrics.preemptions > 0
        assert engine.metrics.cached_tokens["host"] > 0


@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral", "gemma2"])
def test_flashinfer_attends_as_sdpa_does(family: str) -> None:
    model = make_model(family, head_dim=128).to("cuda", torch.bfloat16)
    layout = inspect_model(model)
    twin = deepcopy(model).float()
    exact_layout = inspect_model(twin)
    exact = paged_logits(twin, exact_layout, gather(exact_layout))
    expected = paged_logits(model, layout, gather(layout))
    got = paged_logits(model, layout, lambda arena: FlashInferBackend(arena, layout.layers))
    for true, one, other in zip(exact, expected, got, strict=True):
        if family == "gemma2":  # SDPA's is 2 % from float32 itself, so two of it differ by more
            assert difference(true, other) <= 2**0.5 * difference(true, one)
        else:
            assert difference(one, other) < 2e-2  # bfloat16 rounding


@pytest.mark.parametrize("recorded", [False, True])
def test_sinks_take_their_share_of_what_flashinfer_attends_to(recorded: bool) -> None:
    """Beside windows, as in gpt-oss, whose experts would be others where rounding differs."""
    model = make_model("mistral", head_dim=128).to("cuda", torch.bfloat16)
    layout = with_sinks(inspect_model(model), "cuda")
    expected = paged_logits(model, layout, gather(layout))
    got = paged_logits(
        model, layout, lambda arena: FlashInferBackend(arena, layout.layers), recorded=recorded
    )
    for one, other in zip(expected, got, strict=True):
        assert difference(one, other) < 2e-2  # bfloat16 rounding


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_recorded_steps_compute_what_launched_ones_do(family: str) -> None:
    model = make_model(family, head_dim=128).to("cuda", torch.bfloat16)
    layout = inspect_model(model)

    def backend(arena: DeviceArena) -> FlashInferBackend:
        return FlashInferBackend(arena, layout.layers)

    expected = paged_logits(model, layout, backend)
    for _ in range(2):  # the second time over a model that is compiled
        got = paged_logits(model, layout, backend, recorded=True)
        for one, other in zip(expected, got, strict=True):
            assert difference(one, other) < 2e-2  # bfloat16 rounding


def test_a_model_that_asks_the_host_runs_without_recorded_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama", head_dim=128).to("cuda", torch.bfloat16)
    layout = inspect_model(model)

    def backend(arena: DeviceArena) -> FlashInferBackend:
        return FlashInferBackend(arena, layout.layers)

    expected = paged_logits(model, layout, backend)
    torch._dynamo.reset()  # code that was compiled before does not call what is replaced here
    plain = LlamaMLP.forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def asks(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        assert float(x.norm()) > 0
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", asks)
    got = paged_logits(model, layout, backend, recorded=True, can_record=False)
    torch._dynamo.reset()
    assert "steps run without CUDA graphs" in caplog.text
    torch.rand(1, device="cuda")  # refused while PyTorch takes its generator to be recorded
    for one, other in zip(expected, got, strict=True):
        assert difference(one, other) < 2e-2  # bfloat16 rounding
