"""Cold experts on the CPU give what the device gives, beside it. Here the device is a CPU too."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import reference, run
from expert_layers import (
    HIDDEN,
    KINDS,
    NUM_EXPERTS,
    PLAIN,
    buffered,
    computed,
    group,
    make_layers,
    rounded,
    routed,
)
from test_expert_buffer import PROMPTS

from hotset.cost.cold_experts import MOST_TOKENS, ColdCost
from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.cpu import ColdExperts, device_seconds
from hotset.experts.gating import dynamic_experts
from hotset.experts.narrow import NarrowDType
from hotset.experts.weights import experts_of
from hotset.options import Options

MakeEngine = Callable[..., Engine]
FAST_CPU = ColdCost(1.0, ((1, 1e-6),), 0.0)  # nothing is copied
EVEN = ColdCost(1e-3, ((1, 1e-3), (16, 2e-3)), 0.0)


@pytest.fixture
def attach() -> Iterator[Callable[..., ColdExperts]]:
    """Lets the CPU take part in a buffer's steps, at a cost that the test says."""
    made: list[ColdExperts] = []

    def make(
        buffer: ExpertBuffer, cost: ColdCost, mode: str = "on", *, top_k: int = 2, **sizes: int
    ) -> ColdExperts:
        table = buffer.layers[0].table
        cold = ColdExperts(
            sizes.get("hidden", HIDDEN),
            top_k,
            torch.float32,
            num_experts=table.num_experts,
            num_slots=table.num_slots,
            is_pinned=False,
            mode=mode,
            num_threads=2,
        )
        cold.cost = cost
        buffer.attach_cold(cold)
        made.append(cold)
        return cold

    yield make
    for cold in made:
        cold.close()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("cost", [FAST_CPU, EVEN], ids=["fast", "even"])
@pytest.mark.parametrize("plan", ["cache", "stream", "auto"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_both_together_compute_what_resident_experts_do(
    kind: dict[str, bool],
    plan: str,
    cost: ColdCost,
    grouped: bool,
    attach: Callable[..., ColdExperts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = make_layers(3, **kind)
    if grouped:
        group(monkeypatch)
    others, buffer = buffered(layers, expert_slots=2, expert_plan=plan)
    cold = attach(buffer, cost)
    for num_tokens in (1, 9, 2, MOST_TOKENS, 1, MOST_TOKENS + 1, 3):
        before = cold.num_computed
        for got, expected in computed(others, layers, num_tokens):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        if num_tokens > MOST_TOKENS:
            assert cold.num_computed == before
        elif num_tokens >= 9:
            assert cold.num_computed > before
    counts = buffer.counts()
    assert counts.expert_cpu_computed == cold.num_computed > 0


@torch.inference_mode()
def test_what_is_computed_takes_no_slot_and_what_is_split_off_does(
    attach: Callable[..., ColdExperts],
) -> None:
    layers = make_layers(1, **PLAIN)
    (layer,), buffer = buffered(layers, expert_slots=2, expert_plan="cache")
    cold = attach(buffer, FAST_CPU)
    x, weights = torch.randn(2, HIDDEN), torch.full((2, 2), 0.5)

    def step(*ids: int) -> tuple[int, int, int]:
        buffer.reset_counts()
        dynamic_experts(layer, x, torch.tensor(ids).view(2, 2), weights)
        counts = buffer.counts()
        return counts.expert_hits, counts.expert_misses, counts.expert_cpu_computed

    assert step(0, 1, 0, 1) == (2, 0, 0)
    assert step(0, 2, 3, 4) == (1, 0, 3)
    assert step(0, 2, 3, 1) == (2, 0, 2)  # nobody took the place of 1
    cold.cost = EVEN
    # Of three with two rows, one and one, the first is copied, which leaves least to compute.
    assert step(0, 1, 0, 1) == (2, 0, 0)
    assert step(2, 3, 2, 4) == (0, 1, 2)
    assert step(2, 3, 2, 3) == (1, 1, 0)  # one copy is faster than two rows


@torch.inference_mode()
def test_experts_of_other_ranks_are_nobodys_work(attach: Callable[..., ColdExperts]) -> None:
    layers = make_layers(1, transposed=False, bias=True, gate=True)
    layers[0]._is_expert_parallel = True
    (layer,), buffer = buffered(layers, expert_slots=2, expert_plan="cache")
    cold = attach(buffer, FAST_CPU)
    x, _, weights = routed(9)
    ids = torch.randint(0, 2 * NUM_EXPERTS, (9, 2))
    expected = dynamic_experts(layers[0], x, ids, weights)
    got = dynamic_experts(layer, x, ids, weights)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    before = cold.num_computed
    nobody = ids.clamp(min=NUM_EXPERTS)
    assert dynamic_experts(layer, x, nobody, weights).count_nonzero() == 0
    assert cold.num_computed == before


@torch.inference_mode()
def test_its_part_is_added_to_what_fused_kernels_summed(attach: Callable[..., ColdExperts]) -> None:
    layers = make_layers(1, transposed=False, bias=True, gate=True)
    _layers, buffer = buffered(layers, expert_slots=2, expert_plan="cache")
    attach(buffer, FAST_CPU)
    cold = buffer.layers[0].cold
    assert cold is not None
    x, ids, weights = routed(9)
    left, work = cold.begin(x, ids.reshape(-1))
    assert work is not None
    # The ids that are left to the device, without the CPU: nobody's add nothing.
    masking = copy.deepcopy(layers[0])
    experts_of(masking).masks_others = True
    summed = dynamic_experts(masking, x, left.view(9, 2), weights)
    summed += cold.weighted(work, weights)
    expected = dynamic_experts(layers[0], x, ids, weights)
    torch.testing.assert_close(summed, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_failure_in_a_thread_is_raised_and_the_next_step_is_right(
    attach: Callable[..., ColdExperts],
) -> None:
    layers = make_layers(1, **PLAIN)
    (layer,), buffer = buffered(layers, expert_slots=2, expert_plan="cache")
    attach(buffer, FAST_CPU)
    x, ids, weights = routed(9)
    expected = dynamic_experts(layers[0], x, ids, weights)
    gate = layer._apply_gate
    calls = iter([RuntimeError("out of memory")])

    def failing(rows: torch.Tensor) -> torch.Tensor:
        if error := next(calls, None):
            raise error
        return gate(rows)

    layer._apply_gate = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        dynamic_experts(layer, x, ids, weights)
    got = dynamic_experts(layer, x, ids, weights)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    experts_of(layer).buffer.table.check()


@torch.inference_mode()
def test_what_is_measured_decides(attach: Callable[..., ColdExperts]) -> None:
    layers = make_layers(1, transposed=False, bias=True, gate=True)
    _, buffer = buffered(layers, expert_slots=2, expert_plan="cache")
    cold = attach(buffer, FAST_CPU, "auto")
    first = buffer.layers[0]
    assert first.cold is not None
    copied = []
    cold_layer = first.cold
    cost = cold.measure(cold_layer, copied.append, 1e-3)
    assert copied == [NUM_EXPERTS] * 2
    assert [rows for rows, _ in cost.cpu_s] == [1, 4, 16] and min(s for _, s in cost.cpu_s) > 0
    assert cost.layer_s > 1e-3
    assert cold.num_computed == 0
    assert not any(map(cold.takes, range(1, 100)))  # a copy takes no time here
    assert "it never pays" in cold.describe()
    cold.mode, cold._takes = "on", {}
    assert [count for count in range(1, 100) if cold.takes(count)] == list(
        range(1, MOST_TOKENS + 1)
    )
    assert "steps of 1 to 64 tokens" in cold.describe()
    assert device_seconds(torch.device("cpu")) > 0


@pytest.mark.parametrize("plan", ["cache", "stream", "auto"])
@pytest.mark.parametrize("cold_dtype", ["fp8", "int4"])
@torch.inference_mode()
def test_experts_in_few_bits_are_measured_and_computed(cold_dtype: NarrowDType, plan: str) -> None:
    layers = make_layers(2, **PLAIN)
    expected_layers = rounded(layers, cold_dtype)
    others, buffer = buffered(
        layers, expert_slots=2, expert_plan=plan, expert_cold_dtype=cold_dtype
    )
    dynamic_experts(others[0], *routed(1))  # as at start: the model has run then
    assert "cold experts on the CPU, on" in buffer.compute_cold_on_cpu("on")
    assert buffer._cold is not None
    buffer._cold.cost = FAST_CPU
    for num_tokens in (1, 9, 2):
        for expected_layer, layer in zip(expected_layers, others, strict=True):
            x, ids, weights = routed(num_tokens)
            expected = dynamic_experts(expected_layer, x, ids, weights)
            got = dynamic_experts(layer, x, ids, weights)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert buffer._cold.num_computed > 0
    buffer.close()


def test_an_engine_answers_the_same_with_the_cpu_taking_part(
    make_engine: MakeEngine, attach: Callable[..., ColdExperts]
) -> None:
    engine = make_engine("qwen3_moe", expert_slots=2, expert_plan="cache")
    assert engine.experts is not None
    attach(engine.experts, EVEN, top_k=3, hidden=64)
    # In float32, and these tokens' logits are further apart than its rounding.
    assert run(engine, PROMPTS) == reference("qwen3_moe", PROMPTS)
    assert engine.metrics.expert_cpu_computed > 0 and engine.metrics.expert_misses > 0


def test_a_step_that_is_recorded_while_serving_decides_without_the_cpu_and_is_not_counted(
    make_engine: MakeEngine, attach: Callable[..., ColdExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("qwen3_moe", expert_slots=2, expert_plan="cache")
    experts = engine.experts
    assert experts is not None
    attach(experts, EVEN, top_k=3, hidden=64)
    seen: list[bool] = []

    def record() -> bool:
        seen.append(experts.launches(1))
        experts._counts += 7  # as a trial does
        return True

    monkeypatch.setattr(engine.executor.runner, "warm_up", record)
    engine.warm_up()
    assert seen == [False] and experts.launches(1)
    assert experts.counts().expert_bytes == 0


def test_flags_that_cannot_work_are_refused(make_engine: MakeEngine, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="expert_cpu is 'on', which does nothing"):
        Options.of(expert_cpu="on")
    with pytest.raises(ConfigError, match="the device is the CPU, which computes all experts"):
        make_engine("qwen3_moe", expert_slots=2, expert_cpu="on")
    engine = make_engine("qwen3_moe", expert_slots=2, expert_cpu="auto")
    assert "computed by the CPU anyway" in engine.report
    with pytest.raises(ConfigError, match="leaves experts on disk"):
        make_engine(
            "qwen3_moe",
            expert_slots=2,
            expert_cpu="auto",
            expert_host_gib=5 * 24 * 1024 / 2**30,
            expert_disk_path=tmp_path,
        )
