"""Experts in slots give what resident experts give, whatever is resident and however it comes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import give_slots, reference, run
from expert_layers import (
    KINDS,
    MOVABLE,
    NUM_EXPERTS,
    PLAIN,
    buffered,
    computed,
    group,
    guess,
    make_layers,
    packed,
    rounded,
    routed,
)
from test_experts import MOE_FAMILIES
from tiny_models import make_config, make_model
from torch import nn

from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.eviction import POLICIES
from hotset.experts import compute, hosting
from hotset.experts import layer as expert_layer
from hotset.experts.gating import dynamic_experts, use_dynamic_gating
from hotset.experts.host import ColdSource, ExpertLayout, HostExperts
from hotset.experts.narrow import NarrowDType, relative_rms, rounded_layout
from hotset.experts.prefetch import find_routers
from hotset.experts.residency import SlotTable
from hotset.experts.weights import experts_layers, experts_of
from hotset.memory.region import SharedRegion
from hotset.model.dummy import load_dummy
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.units import GIB

MakeEngine = Callable[..., Engine]
PLANS = [
    *({"expert_plan": "cache", "expert_eviction": name} for name in POLICIES),
    {"expert_plan": "stream"},
    {"expert_plan": "auto"},
]
# By step, by layer: the two experts of the only token.
ORACLE_STEPS = [
    [(0, 1), (3, 4), (2, 5)],
    [(3, 5), (0, 4), (4, 1)],
    [(4, 2), (5, 1), (0, 3)],
    [(0, 5), (2, 3), (4, 5)],
]
PROMPTS = [[5, 9, 13, 200, 7], [31] * 20, [77, 3, 250]]


def source_of(layer: nn.Module) -> ColdSource:
    """Where the experts of a layer are that are not resident."""
    hosted = experts_of(layer).hosted
    assert hosted is not None
    return hosted.source


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_slots", [1, 2, 5])
@pytest.mark.parametrize("options", PLANS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_buffered_experts_compute_exactly_what_resident_ones_do(
    kind: dict[str, bool],
    options: dict[str, Any],
    num_slots: int,
    grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = make_layers(3, **kind)
    if grouped:
        group(monkeypatch)
        resident, _ = buffered(layers, expert_slots=NUM_EXPERTS, expert_plan="cache")
    else:
        resident = packed(layers)
    others, buffer = buffered(layers, expert_slots=num_slots, **options)
    for num_tokens in (1, 9, 2, 1, 3, 33, 1):
        for got, expected in computed(others, resident, num_tokens):
            if grouped:  # a pass has its rows elsewhere, where the CPU's vectors end elsewhere
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(got, expected)
    assert buffer.counts().expert_bytes > 0


@pytest.mark.parametrize("num_slots", [2, 5])
@pytest.mark.parametrize(
    "options",
    [*MOVABLE, {"expert_plan": "stream"}, {"expert_plan": "stream", "expert_cold_dtype": "fp8"}],
    ids=str,
)
@torch.inference_mode()
def test_fused_kernels_find_experts_in_slots_and_staging_and_give_the_same_bits(
    options: dict[str, Any], num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a GPU computes, in Triton's interpreter.
    monkeypatch.setattr(compute, "has_fused_kernel", lambda weight: True)
    monkeypatch.setattr(hosting, "can_pack", lambda: False)
    plain = make_layers(3, **PLAIN)
    cold = options.get("expert_cold_dtype")
    resident = rounded(plain, cold) if cold else plain
    others, buffer = buffered(plain, [guess] * 3, expert_slots=num_slots, **options)
    for num_tokens in (1, 9, 2):
        for got, expected in computed(others, resident, num_tokens, with_others=True):
            assert torch.equal(got, expected)
    assert buffer.counts().expert_bytes > 0


@pytest.mark.parametrize("way", ["in turn", "grouped", "fused"])
@pytest.mark.parametrize("options", MOVABLE, ids=str)
@torch.inference_mode()
def test_what_is_in_memory_that_slots_have_given_up_does_not_matter(
    options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "can_pack", lambda: False)
    monkeypatch.setattr(expert_layer, "has_grouped_kernel", lambda weight: way == "grouped")
    monkeypatch.setattr(compute, "has_fused_kernel", lambda weight: way == "fused")
    plain = make_layers(3, **PLAIN)
    cold = options.get("expert_cold_dtype")
    resident = rounded(plain, cold) if cold else plain
    unit_bytes = 3 * experts_of(plain[0]).layout.payload_bytes
    region = SharedRegion(unit_bytes, 4096, 5 * unit_bytes // 4096, fewest_slots=2, most_slots=5)
    others, buffer = buffered(plain, [guess] * 3, region, expert_slots=3, **options)
    for num_tokens, num_slots in ((1, 3), (9, 5), (2, 4), (1, 2), (9, 2), (3, 4), (4, 5), (9, 3)):
        if num_slots < buffer.num_slots:
            buffer.resize(num_slots)
        while num_slots > buffer.num_slots:
            buffer.resize(buffer.num_slots + 1)
        assert buffer.memory is not None
        buffer.memory[region.first_block(num_slots) * 4096 :] = 255  # NaN
        for got, expected in computed(others, resident, num_tokens, with_others=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert buffer.counts().expert_bytes > 0


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("plan", ["cache", "stream", "auto"])
@pytest.mark.parametrize("cold", ["fp8", "int4"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_narrow_experts_have_the_same_values_wherever_they_are(
    kind: dict[str, bool],
    cold: NarrowDType,
    plan: str,
    grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = make_layers(3, **kind)
    resident = rounded(layers, cold)
    if grouped:
        group(monkeypatch)
    else:
        resident = packed(resident)
    others, buffer = buffered(layers, expert_slots=2, expert_plan=plan, expert_cold_dtype=cold)
    for num_tokens in (1, 9, 33, 2):
        for got, expected in computed(others, resident, num_tokens):
            if grouped:
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(got, expected)
    narrow_bytes = source_of(others[0]).payload_bytes
    assert buffer.counts().expert_bytes % narrow_bytes == 0 < buffer.counts().expert_bytes
    assert buffer.rounding_error > 0


@pytest.mark.parametrize(("cold", "largest"), [("fp8", 0.03), ("int4", 0.1)])
def test_rounding_errors_are_those_of_the_weights_and_small(
    cold: NarrowDType, largest: float
) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(5, 96, 128), 0.01 * torch.randn(5, 128, 192)
    layout = ExpertLayout((96, 128), (128, 192), torch.float32)
    host = HostExperts(layout, 5, rounded_layout(layout.up, layout.down, cold))
    host.store(up, down, torch.device("cpu"))
    errors = [got - want for got, want in zip(host.matrices(), (up, down), strict=True)]
    for error, weight in zip(errors, (up, down), strict=True):
        assert 0.01 < float(error.norm() / weight.norm()) < largest
    square = sum(float(error.double().square().sum()) for error in errors)
    total = sum(float(weight.double().square().sum()) for weight in (up, down))
    assert relative_rms([host.rounding]) == pytest.approx((square / total) ** 0.5)
    assert host.payload_bytes < layout.payload_bytes / (3 if cold == "fp8" else 6)


@pytest.mark.parametrize("cold", ["fp8", "int4"])
def test_zeros_and_extremes_come_back_and_rounding_again_changes_nothing(cold: NarrowDType) -> None:
    narrow = rounded_layout((2, 64), (64, 128), cold)
    up = torch.stack([torch.zeros(64), torch.linspace(-3, 8, 64)]).unsqueeze(0)
    down = 1e-20 * torch.randn(1, 64, 128)
    once = narrow.dequantise(narrow.quantise(up, down), torch.float32)
    assert not once[0][0, 0].any()
    assert float(once[0][0, 1, -1]) == 8
    assert all(values.isfinite().all() for values in once)
    again = narrow.dequantise(narrow.quantise(once[0], once[1]), torch.float32)
    assert torch.equal(once[0], again[0])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("options", PLANS, ids=str)
@torch.inference_mode()
def test_experts_of_other_ranks_add_nothing_and_take_no_slot(
    options: dict[str, Any], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grouped:
        group(monkeypatch)
    layers = make_layers(1, transposed=False, bias=True, gate=True)
    layers[0]._is_expert_parallel = True
    (layer,), buffer = buffered(layers, expert_slots=2, **options)
    x, _, weights = routed(9)
    ids = torch.randint(0, 2 * NUM_EXPERTS, (9, 2))
    expected = dynamic_experts(layers[0], x, ids, weights)
    torch.testing.assert_close(
        dynamic_experts(layer, x, ids, weights), expected, atol=2e-5, rtol=1e-4
    )
    before = buffer.counts()
    nobody = ids.clamp(min=NUM_EXPERTS)
    assert dynamic_experts(layer, x, nobody, weights).count_nonzero() == 0
    assert (buffer.counts().expert_hits, buffer.counts().expert_misses) == (
        before.expert_hits,
        before.expert_misses,
    )


def table_of(eviction: Any, num_slots: int = 3) -> SlotTable:
    counts = torch.zeros(5, dtype=torch.int64)
    return SlotTable(8, num_slots, eviction=eviction, counts=counts)


def use(table: SlotTable, *ids: int) -> list[int]:
    """A step that needs `ids`; the experts that have slots after it, in order."""
    which = table.begin(torch.tensor(ids))
    for number in range(table.num_passes(len(ids))):
        table.load(which == number)
        table.check()
    return [expert for expert, slot in enumerate(table.slots().tolist()) if slot >= 0]


@pytest.mark.parametrize(
    ("eviction", "kept"),
    [("lru", [0, 3, 4]), ("lfu", [0, 1, 4]), ("lifo", [0, 1, 4]), ("least-stale", [0, 3, 4])],
)
def test_each_policy_evicts_whom_it_says(eviction: str, kept: list[int]) -> None:
    table = table_of(eviction)
    for expert in (0, 1, 1, 3, 0):
        use(table, expert)
    assert use(table, 4) == kept


@pytest.mark.parametrize("eviction", POLICIES)
def test_what_a_pass_needs_stays(eviction: str) -> None:
    table = table_of(eviction, num_slots=4)
    torch.manual_seed(0)
    for _ in range(50):
        ids = torch.randint(0, 8, (int(torch.randint(1, 9, ())),))
        which = table.begin(ids)
        seen: set[int] = set()
        for number in range(table.num_passes(len(ids))):
            wanted = which == number
            table.load(wanted)
            table.check()
            assert (table.slots()[wanted] >= 0).all()
            seen |= set(wanted.nonzero().flatten().tolist())
        assert seen == set(ids.tolist())


@pytest.mark.parametrize("eviction", POLICIES)
def test_slots_that_are_not_in_use_are_nobodys(eviction: Any) -> None:
    counts = torch.zeros(5, dtype=torch.int64)
    table = SlotTable(8, 6, eviction=eviction, counts=counts, fewest=2, num_active=3)
    assert use(table, 5) and table.num_passes(8) == 4
    # The expert that was used last is the first to come back.
    table.shrink(2)
    use(table, 6)
    use(table, 7)
    absent = [expert for expert in (5, 6) if table.slots()[expert] < 0]
    came, slot = table.grow()
    assert came.tolist() == absent[-1:] and slot.tolist() == [2]
    table.check()
    torch.manual_seed(0)
    for step in range(60):
        if step % 3 == 0 and table.num_active < 6:
            table.grow()
        elif step % 7 == 0:
            table.shrink(2)
        if step % 5 == 0:
            table.prefetch(torch.randint(0, 8, (4,)), 2)
        needed = use(table, *torch.randint(0, 8, (int(torch.randint(1, 9, ())),)).tolist())
        assert len(needed) == table.num_active
        experts, places = table.absent()
        assert len(experts) == 6 and sorted(experts.tolist())[: table.num_active - 2] == (
            [-1] * (table.num_active - 2)
        )
        for expert, place in enumerate(places.tolist()[:-1]):
            assert place == table.slots()[expert] or experts[place - 6] == expert
        assert places[-1] == 12


def test_hits_and_misses_are_counted_and_a_hit_moves_nothing() -> None:
    table = table_of("lru")
    use(table, 5, 6)
    which = table.begin(torch.tensor([6, 5, 6]))
    experts, _ = table.load(which == 0)
    assert experts.tolist() == [-1, -1, -1]
    assert table._counts.tolist() == [2, 2, 0, 0, 0]


@pytest.mark.parametrize("eviction", POLICIES)
def test_a_prefetch_takes_what_is_named_most_and_keeps_what_is_named_and_here(
    eviction: str,
) -> None:
    table = table_of(eviction, num_slots=4)
    experts, _ = table.prefetch(torch.tensor([1, 7, 5, 6, 6, 5, 6, 2, 8]), 2)
    table.check()
    assert experts.tolist() == [6, 5]
    assert {e for e, slot in enumerate(table.slots().tolist()) if slot >= 0} == {1, 2, 5, 6}
    assert {5, 1, 3} <= set(use(table, 5, 1, 3))
    assert table._counts.tolist() == [2, 1, 5, 2, 2]  # 1, 2, 5, 6 and 7 were predicted
    # All slots are named: there is no room to copy ahead.
    here = [e for e, slot in enumerate(table.slots().tolist()) if slot >= 0]
    experts, _ = table.prefetch(torch.tensor([*here, 0, 7, 4]), 3)
    assert experts.tolist() == [-1, -1, -1]
    assert [e for e, slot in enumerate(table.slots().tolist()) if slot >= 0] == here


@pytest.mark.parametrize("grouped", [False, True])
@torch.inference_mode()
def test_an_oracle_leaves_misses_to_the_first_layer_and_a_wrong_guess_changes_no_output(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grouped:
        group(monkeypatch)
    layers = make_layers(3, transposed=False, bias=True, gate=True)
    x, _, weights = routed(1)
    steps = [[torch.tensor([[a, b]]) for a, b in step] for step in ORACLE_STEPS]
    for is_right in (True, False):
        coming: list[torch.Tensor] = []

        def guess(hidden: torch.Tensor, *, right: bool = is_right, ids: Any = coming) -> Any:
            return ids[0] if right else (ids[0] + 2) % NUM_EXPERTS

        others, buffer = buffered(
            layers,
            routers=[guess] * 3,
            expert_slots=3,
            expert_plan="cache",
            expert_eviction="least-stale",
            expert_prefetch=2,
        )
        for step in steps:
            for number, (plain, layer) in enumerate(zip(layers, others, strict=True)):
                coming[:] = step[number + 1 : number + 2]
                expected = dynamic_experts(plain, x, step[number], weights)
                got = dynamic_experts(layer, x, step[number], weights)
                torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
                experts_of(layer).buffer.table.check()
        counts = buffer.counts()
        assert counts.expert_predicted == 2 * 2 * len(steps)  # two experts, for two of the layers
        misses = [layer.table._counts[1].item() for layer in buffer.layers]
        assert misses[0] == 4
        if is_right:
            assert counts.expert_predicted_right == counts.expert_predicted
            assert misses[1:] == [0, 0]
            assert 0 < counts.expert_copied_ahead <= counts.expert_predicted
        else:
            assert counts.expert_predicted_right < counts.expert_predicted
            assert sum(misses[1:]) > 0
        moved = counts.expert_bytes // source_of(others[0]).payload_bytes
        assert moved == counts.expert_misses + counts.expert_copied_ahead


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_prefetch_changes_no_answer_and_says_how_well_it_guessed(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, expert_slots=2, expert_plan="cache", expert_prefetch=1)
    assert run(engine, PROMPTS) == reference(family, PROMPTS)
    metrics = engine.metrics
    assert 0 < metrics.expert_predicted_right <= metrics.expert_predicted
    assert metrics.expert_copied_ahead > 0
    assert "1 copied ahead" in engine.report


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"expert_slots": 1},
        {"expert_slots": 2, "expert_plan": "cache"},
        {"expert_slots": 3, "expert_plan": "stream"},
        {"expert_slots": 4},
    ],
    ids=str,
)
def test_an_engine_answers_the_same_whatever_is_resident(
    family: str, options: dict[str, Any], make_engine: MakeEngine
) -> None:
    engine = make_engine(family, max_num_batched_tokens=16, **options)
    assert run(engine, PROMPTS) == reference(family, PROMPTS)
    num_experts = {"qwen3_moe": 8, "olmoe": 8}.get(family, 4)
    if options["expert_slots"] < num_experts:
        assert engine.metrics.expert_bytes > 0
        assert f"{options['expert_slots']} of {num_experts} in each" in engine.report
    else:
        assert engine.metrics.expert_bytes == 0
        assert f"all {num_experts} of each" in engine.report


@pytest.mark.parametrize("cold", ["fp8", "int4"])
def test_narrow_experts_answer_the_same_whatever_is_resident_and_their_kv_is_their_own(
    cold: NarrowDType, make_engine: MakeEngine
) -> None:
    exact = make_engine("qwen3_moe", expert_slots=2)
    engines = [
        make_engine("qwen3_moe", expert_slots=slots, expert_plan=plan, expert_cold_dtype=cold)
        for slots, plan in ((1, "cache"), (2, "stream"), (5, "auto"), (7, "cache"))
    ]
    answers = [run(engine, PROMPTS) for engine in engines]
    assert all(answer == answers[0] for answer in answers)
    assert {engine.kv.prefixes.fingerprint for engine in engines} == {
        engines[0].kv.prefixes.fingerprint
    }
    assert engines[0].kv.prefixes.fingerprint != exact.kv.prefixes.fingerprint
    assert f"in host memory as {cold} (RMS error " in engines[0].report
    assert engines[0].metrics.expert_rounding_error > 0 == exact.metrics.expert_rounding_error


def test_auto_uses_both_plans_as_steps_change(make_engine: MakeEngine) -> None:
    engine = make_engine("qwen3_moe", expert_slots=5)
    run(engine, [[5, 9, 13, 200, 7, 8, 11, 99, 54, 3, 17, 80]], max_tokens=8)
    assert engine.experts is not None
    hits, misses, *_, streamed = engine.experts._counts.sum(0).tolist()
    assert streamed == 3 * 3  # the prompt: the experts without a slot, in each layer
    assert hits + misses == 3 * 7 * 3  # then seven decodes of three experts, likewise


@pytest.mark.parametrize("num_slots", [1, 5, 8])
def test_absent_experts_are_those_without_a_slot_and_all_have_a_place(num_slots: int) -> None:
    table = table_of("least-stale", num_slots)
    torch.manual_seed(0)
    for _ in range(20):
        here = use(table, *torch.randint(0, 8, (3,)).tolist())
        experts, places = table.absent()
        assert experts.tolist() == [e for e in range(8) if e not in here]
        slots = table.slots().tolist()
        for expert in range(8):
            rank = experts.tolist().index(expert) if slots[expert] < 0 else 0
            assert places[expert] == (slots[expert] if slots[expert] >= 0 else num_slots + rank)
        assert places[8] == 8


@torch.inference_mode()
def test_a_streamed_step_leaves_the_slots_as_they_are() -> None:
    (layer,), _ = buffered(make_layers(1, **PLAIN), expert_slots=3)
    table = experts_of(layer).buffer.table
    for num_tokens, streams in ((1, False), (40, True)):
        before = table.slots().clone()
        x, ids, weights = routed(num_tokens)
        ids[0] = torch.tensor([4, 5])  # which have no slot at first
        dynamic_experts(layer, x, ids, weights)
        assert experts_of(layer).buffer.streams(num_tokens, 2) == streams
        assert torch.equal(before, table.slots()) == streams


def test_a_budget_in_gib_is_kept_and_weights_are_not_counted_twice(
    make_engine: MakeEngine,
) -> None:
    whole = make_engine("qwen3_moe").sizes.weights_bytes
    payload = 24 * 1024  # 3 * 64 * 32 float32
    budget = 3 * 3 * payload + payload // 2
    engine = make_engine("qwen3_moe", expert_gib=budget / GIB, expert_plan="cache")
    assert engine.experts is not None
    assert engine.experts.device_bytes == 3 * 3 * payload
    assert engine.experts.host_bytes == 3 * 8 * payload
    assert engine.sizes.expert_bytes == 3 * 3 * payload
    assert engine.sizes.weights_bytes == whole - 3 * 8 * payload
    with pytest.raises(ConfigError, match="needs"):
        make_engine("qwen3_moe", expert_gib=payload / GIB, expert_plan="cache")
    streaming = make_engine("qwen3_moe", expert_gib=18 * payload / GIB, expert_plan="stream")
    assert streaming.experts is not None
    # Two slots in each of three layers, and two buffers for six experts.
    assert streaming.experts.device_bytes == 18 * payload


def test_a_second_engine_shares_the_host_copy() -> None:
    model = make_model("qwen3_moe")
    use_dynamic_gating(model)
    first, _ = give_slots(model, Options.of(expert_slots=2))
    second, _ = give_slots(model, Options.of(expert_slots=5, expert_plan="cache"))
    assert first is not None and second is not None
    pairs = zip(first.layers, second.layers, strict=True)
    assert [one.source is other.source for one, other in pairs] == [True] * 3
    with pytest.raises(ConfigError, match="in host memory already"):
        give_slots(model, Options.of())
    with pytest.raises(ConfigError, match="in host memory as auto already"):
        give_slots(model, Options.of(expert_slots=2, expert_cold_dtype="fp8"))
    none, report = give_slots(model, Options.of(expert_slots=8))
    assert none is None and "nothing is buffered" in report
    tokens = torch.tensor([[5, 9, 13]])
    expected = make_model("qwen3_moe")
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


def test_flags_without_effect_are_refused(make_engine: MakeEngine) -> None:
    for options in (
        {"expert_slots": 1, "expert_gib": 1.0},
        {"expert_plan": "cache"},
        {"expert_eviction": "lfu"},
        {"expert_cold_dtype": "int4"},
        {"expert_prefetch": 1},
        {"expert_slots": 1, "expert_prefetch": -1},
        {"expert_slots": 1, "expert_prefetch": 1, "expert_plan": "stream"},
        {"expert_slots": 1, "expert_plan": "stream", "expert_eviction": "lfu"},
        {"expert_slots": 0},
        {"expert_gib": 0.0},
    ):
        with pytest.raises(ConfigError, match="expert_"):
            Options.of(**options)
    with pytest.raises(ConfigError, match="expert_slots is 2, but LlamaForCausalLM has no experts"):
        make_engine("llama", expert_slots=2)
    with pytest.raises(ConfigError, match="a layer has 8 experts"):
        make_engine("qwen3_moe", expert_slots=9)
    with pytest.raises(ConfigError, match="fp8, which does nothing while all experts are on the"):
        make_engine("qwen3_moe", expert_slots=8, expert_cold_dtype="fp8")
    with pytest.raises(
        ConfigError, match="expert_cold_dtype is 'int3'; expected auto, fp8 or int4"
    ):
        Options.of(expert_slots=1, expert_cold_dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rows of 20 and 64 values do not divide into groups"):
        rounded_layout((64, 20), (20, 64), "int4")


def test_routers_that_are_not_found_are_an_error_in_one_line() -> None:
    model = make_model("qwen3_moe")
    find_routers(model, experts_layers(model))
    block = model.model.layers[1].mlp
    block.gate = nn.Linear(64, 8)  # returns logits
    with pytest.raises(ConfigError, match="needs the routers of Qwen3MoeForCausalLM"):
        find_routers(model, experts_layers(model))
    del block.gate
    use_dynamic_gating(model)
    with pytest.raises(ConfigError, match="needs the routers of Qwen3MoeForCausalLM"):
        give_slots(model, Options.of(expert_slots=2, expert_prefetch=1))
    assert model.model.layers[1].mlp.experts.down_proj is not None  # unchanged


def test_a_checkpoint_and_random_weights_are_the_same_with_experts_on_the_host(
    tmp_path: Path,
) -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        folder = tmp_path / family
        make_model(family).save_pretrained(folder)
        one, other = (
            load_model(str(folder), device="cpu", dtype="auto", experts_on_host=on_host)
            for on_host in (False, True)
        )
        assert_same(one.model, other.model)
        config = make_config(family, tie_word_embeddings=family == "gpt_oss")
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        one, other = (
            load_dummy(str(folder), device="cpu", dtype="auto", experts_on_host=on_host)
            for on_host in (False, True)
        )
        assert_same(one.model, other.model)
        assert one.fingerprint == other.fingerprint


def assert_same(one: Any, other: Any) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    tokens = torch.tensor([[5, 9, 13, 200]])
    with torch.inference_mode():
        assert torch.equal(one(tokens).logits, other(tokens).logits)
