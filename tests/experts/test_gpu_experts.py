"""Buffered experts on an NVIDIA GPU: run these there with `pytest -m gpu`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import give_slots
from expert_layers import PLAIN, Sizes, buffered, make_layers
from paged import difference, paged_logits
from tiny_models import make_model
from torch import nn

from hotset.attention.flashinfer.backend import FlashInferBackend
from hotset.engine.engine import Engine
from hotset.eviction import POLICIES
from hotset.executor.probe import inspect_model
from hotset.executor.runner import ModelRunner
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.compute import is_fused
from hotset.experts.gating import dynamic_experts, use_dynamic_gating
from hotset.experts.host import HostExperts
from hotset.experts.narrow import NarrowDType, rounded_layout
from hotset.experts.weights import experts_of
from hotset.memory.arena import DeviceArena
from hotset.options import Options

MakeEngine = Callable[..., Engine]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
SIZES, TOP_K, NUM_LAYERS = Sizes(16, 256, 128, 0.1), 4, 3
PLANS = [
    *({"expert_plan": "cache", "expert_eviction": name} for name in POLICIES),
    *(
        {"expert_plan": plan, "expert_cold_dtype": cold}
        for plan in ("stream", "auto")
        for cold in ("auto", "fp8", "int4")
    ),
    {"expert_plan": "cache", "expert_cold_dtype": "fp8"},
    {"expert_plan": "cache", "expert_cold_dtype": "int4"},
    {"expert_plan": "cache", "expert_prefetch": 1},
    {"expert_plan": "auto", "expert_cold_dtype": "int4", "expert_prefetch": 1},
]


def make_pair(
    *, fused: bool, **options: Any
) -> tuple[list[nn.Module], list[nn.Module], ExpertBuffer]:
    """Resident layers, the same ones buffered, and their buffer; with a bias none are fused."""
    layers = make_layers(NUM_LAYERS, sizes=SIZES, **PLAIN | {"bias": not fused})
    resident = [layer.to("cuda", torch.bfloat16) for layer in layers]
    first = experts_of(resident[0])
    assert is_fused(first, first.weights, 1) == fused
    routers = [lambda hidden: hidden[:, : SIZES.num_experts].topk(TOP_K).indices] * NUM_LAYERS
    layers, buffer = buffered(resident, routers, device="cuda", **options)
    for layer, whole in zip(layers, resident, strict=True):
        # Resident experts have the values that come back from host memory, too.
        source = experts_of(layer).source
        assert isinstance(source, HostExperts)
        up, down = source.matrices()
        whole.gate_up_proj.copy_(up)
        whole.down_proj.copy_(down)
    return resident, layers, buffer


@pytest.mark.parametrize("cold", ["fp8", "int4"])
@torch.inference_mode()
def test_a_gpu_rounds_as_the_cpu_does(cold: NarrowDType) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(3, 96, 128).bfloat16(), torch.randn(3, 128, 192).bfloat16()
    narrow = rounded_layout((96, 128), (128, 192), cold)
    here = narrow.quantise(up, down)
    there = narrow.quantise(up.cuda(), down.cuda())
    assert torch.equal(there.cpu(), here)
    for one, other in zip(
        narrow.dequantise(here, torch.bfloat16),
        narrow.dequantise(there, torch.bfloat16),
        strict=True,
    ):
        assert torch.equal(other.cpu(), one)


def chain(layers: list[Any], x: Any, ids: Any, weights: Any) -> torch.Tensor:
    for layer, layer_ids in zip(layers, ids, strict=True):
        x = x + dynamic_experts(layer, x, layer_ids, weights)
    return x


def routed(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = torch.randn(NUM_LAYERS, num_tokens, SIZES.num_experts, device="cuda")
    ids = scores.topk(TOP_K).indices
    weights = torch.rand(num_tokens, TOP_K, device="cuda").to(torch.bfloat16)
    x = torch.randn(num_tokens, SIZES.hidden, device="cuda").to(torch.bfloat16)
    return x, ids, weights


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("num_slots", [1, 4, 11])
@pytest.mark.parametrize("options", PLANS, ids=str)
@torch.inference_mode()
def test_buffered_experts_have_the_bits_of_resident_ones(
    options: dict[str, Any], num_slots: int, fused: bool
) -> None:
    resident, layers, buffer = make_pair(fused=fused, expert_slots=num_slots, **options)
    for num_tokens in (1, 40, 2, 1, 300, 1):
        step = routed(num_tokens)
        assert torch.equal(chain(layers, *step), chain(resident, *step))
    assert buffer.counts().expert_bytes > 0
    for layer in layers:
        experts_of(layer).buffer.table.check()
    buffer.close()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16, 64])
@pytest.mark.parametrize("options", PLANS, ids=str)
@torch.inference_mode()
def test_a_recorded_step_does_not_depend_on_what_was_resident(
    options: dict[str, Any], num_tokens: int, fused: bool
) -> None:
    resident, layers, buffer = make_pair(fused=fused, expert_slots=4, **options)
    static = routed(num_tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain(layers, *static)  # loads kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        out = chain(layers, *static)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    for turn in range(5):
        step = routed(num_tokens)
        for target, source in zip(static, step, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(out, chain(resident, *step))
        if turn == 2:  # another plan in between, perhaps: state is shared
            other = routed(200 // num_tokens)
            assert torch.equal(chain(layers, *other), chain(resident, *other))
    buffer.close()


@pytest.mark.parametrize(
    "options",
    [
        {"expert_plan": "cache", "expert_slots": 3},
        {"expert_plan": "stream", "expert_slots": 2},
        {"expert_slots": 5},
        {"expert_slots": 5, "expert_plan": "cache", "expert_prefetch": 2},
        {"expert_slots": 3, "expert_cold_dtype": "fp8", "expert_prefetch": 1},
    ],
    ids=str,
)
def test_recorded_steps_of_a_model_are_those_of_resident_experts(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(config: Options) -> list[torch.Tensor]:
        model = make_model("qwen3_moe", head_dim=128).to("cuda", torch.bfloat16)
        use_dynamic_gating(model)
        buffer, _ = give_slots(model, config)
        layout = inspect_model(model)
        if buffer is not None:
            plain = ModelRunner.record

            def record_with_join(runner: ModelRunner, **sizes: Any) -> None:
                plain(runner, before_cut=buffer.join, **sizes)

            monkeypatch.setattr(ModelRunner, "record", record_with_join)

        def backend(arena: DeviceArena) -> FlashInferBackend:
            return FlashInferBackend(arena, layout.layers)

        found = paged_logits(model, layout, backend, recorded=True)
        if buffer is not None:
            monkeypatch.undo()
            assert buffer.counts().expert_bytes > 0
        return found

    # Rounded experts are compared with rounded ones of which most are resident.
    cold = options.get("expert_cold_dtype")
    most = {"expert_slots": 7, "expert_plan": "cache", "expert_cold_dtype": cold} if cold else {}
    expected = logits(Options.of(**most))
    for one, other in zip(expected, logits(Options.of(**options)), strict=True):
        assert difference(one, other) < 2e-2  # bfloat16, compiled apart
