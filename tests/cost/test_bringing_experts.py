"""Bringing experts: the cheapest way is taken, and planner, bench and engine take the same."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.cold_experts import MOST_TOKENS, ColdCost
from hotset.cost.expert_steps import ExpertCost, link_of
from hotset.cost.experts import LayerSlots, bring_experts, streams_from
from hotset.cost.hardware import bundled_hardware, load_hardware, nearest_hardware
from hotset.cost.rates import Rates
from hotset.cost.routing import Routing, reach
from hotset.cost.step_time import CostModel, Tiering
from hotset.layout import Layout

SECONDS = st.floats(1e-7, 1e-2)
EXPERTS = st.floats(0, 256)


@given(EXPERTS, EXPERTS, SECONDS, SECONDS, st.floats(0, 1), st.sampled_from([None, 1, 2, 48]))
def test_the_cheaper_plan_is_taken_and_a_layer_waits_for_its_own_copies(
    missed: float,
    absent: float,
    gather_s: float,
    stream_s: float,
    hidden_s: float,
    num_layers: int | None,
) -> None:
    costs = {
        plan: bring_experts(
            missed=missed,
            absent=absent,
            gather_s=gather_s,
            stream_s=stream_s,
            hidden_s=hidden_s,
            plan=plan,
            num_layers=num_layers,
        )
        for plan in ("auto", "cache", "stream")
    }
    assert costs["auto"].seconds == min(costs["cache"].seconds, costs["stream"].seconds)
    layers = num_layers or 1
    assert costs["cache"].seconds == pytest.approx(layers * missed * gather_s)
    # Each layer begins as the copies of its experts and the layer before have ended.
    arrived_s = ended_s = 0.0
    for layer in range(layers):
        began_s = ended_s
        arrived_s = began_s + absent * stream_s
        if layer == 0 and num_layers is not None:
            ended_s = arrived_s  # nothing to hide behind; what it computes hides the next
        else:
            ended_s = max(arrived_s, began_s + hidden_s)
    exposed_s = ended_s - (layers - (num_layers is not None)) * hidden_s
    assert costs["stream"].seconds == pytest.approx(exposed_s, rel=1e-6, abs=1e-9)


@given(st.integers(1, 64), SECONDS, SECONDS, SECONDS)
def test_the_cpu_takes_part_where_that_gains_a_tenth(
    missed: int, gather_s: float, cpu_s: float, hidden_s: float
) -> None:
    known = {"missed": missed, "absent": 128, "gather_s": gather_s, "stream_s": gather_s}
    without = bring_experts(**known, hidden_s=hidden_s)
    brought = bring_experts(**known, hidden_s=hidden_s, cpu_s=cpu_s)
    assert (brought.plan == "cpu") == (cpu_s < 0.9 * without.seconds)
    assert brought.seconds <= without.seconds


def test_streaming_is_chosen_where_a_cache_would_copy_as_much() -> None:
    # Qwen3-30B-A3B: 128 experts of 9.4 MB, 8 of a token; 40 slots.
    rates = Rates.of_hardware(load_hardware("h200"))
    copy_s = 9_437_184 / rates.expert_bytes_per_s
    slots = LayerSlots(128, 40, copy_s, 9_437_184 / rates.memory_bytes_per_s)
    chosen = [slots.streams(tokens, 8) for tokens in (1, 16, 64, 256, 2048)]
    assert chosen == [False, False, True, True, True]
    # 48 tokens need 122.2 experts, 84.0 without a slot. To copy those and then read all takes
    # longer than to stream 88 where an expert comes over the link in a quarter of the time.
    narrow = replace(slots, copy_s=copy_s / 4)
    assert [each.streams(48, 8) for each in (slots, narrow)] == [False, True]


@given(st.integers(2, 256), st.data(), SECONDS, SECONDS)
def test_steps_stream_from_a_number_of_tokens_on(
    num_experts: int, data: st.DataObject, copy_s: float, read_s: float
) -> None:
    num_slots = data.draw(st.integers(0, num_experts - 1))
    top_k = data.draw(st.integers(1, num_experts))
    slots = LayerSlots(num_experts, num_slots, copy_s, read_s)
    first = streams_from(slots, top_k)
    for tokens in (1, 2, 7, 64, 1000, 8192):
        assert slots.streams(tokens, top_k) == (tokens >= first)
    if first not in (1, math.inf):
        assert not slots.streams(int(first) - 1, top_k)


def qwen(gpu: str = "h200") -> CostModel:
    return CostModel(
        load_model("qwen3-30b-a3b"),
        load_hardware(gpu),
        Layout(),
        "bf16",
        CALIBRATIONS["hotset"],
        Routing(),
    )


@pytest.mark.parametrize("gpu", ["h200", "l40s", "gh200"])
def test_planner_and_engine_expect_the_same_step_with_experts_in_host_memory(gpu: str) -> None:
    cost = qwen(gpu)
    engine = ExpertCost(cost, link_of(cost))
    for num_slots, users in itertools.product((1, 40, 100, 127), (1, 4, 16, 64, 256)):
        tiering = Tiering(resident_experts=num_slots / 128)
        planned = cost.decode(users, 640, tiering).expected_s
        assert planned == pytest.approx(engine.decode_step(num_slots, users, 640).seconds)


def test_a_layer_streams_as_the_model_of_whole_steps_says() -> None:
    cost, rates = qwen(), Rates.of_hardware(load_hardware("h200"))
    engine = ExpertCost(cost, link_of(cost))
    size = cost.shape.expert_bytes_each
    for num_slots in (16, 40, 100):
        slots = LayerSlots(
            128, num_slots, size / rates.expert_bytes_per_s, size / rates.memory_bytes_per_s
        )
        first = streams_from(slots, 8)
        # Whole steps hide copies behind attention too, so that they stream a little earlier.
        assert engine.decode_step(num_slots, first + 8, 640).plan == "stream"
        assert engine.decode_step(num_slots, first // 2, 640).plan == "cache"


def test_distinct_experts_are_counted_alike_everywhere() -> None:
    cost = qwen()
    uniform = Routing().distinct(128, 8, 16)
    assert uniform == 128 * reach(8 / 128, 16) == pytest.approx(82.4, abs=0.1)
    assert ExpertCost(cost, link_of(cost)).distinct(16) == uniform
    assert cost.expert_slots_read(16) == uniform
    # 55 of them are cold, so that the CPU pays as long as it takes less than 0.9 of their copies.
    cold = round(uniform * (1 - 43 / 128))
    for factor, pays in ((0.89, True), (0.91, False)):
        measured = ColdCost(1e-3, ((1, 1e-9),), factor * cold * 1e-3)
        assert measured.pays(16, top_k=8, num_experts=128, num_slots=43) == pays
    assert MOST_TOKENS >= 16


def test_a_gpu_without_a_profile_has_the_rates_of_the_nearest() -> None:
    for name in bundled_hardware():
        found = nearest_hardware(load_hardware(name).hbm_bytes_per_s * 1.001)
        assert found.hbm_bytes_per_s == load_hardware(name).hbm_bytes_per_s
    assert nearest_hardware(1.0).name == "l40s"
    assert nearest_hardware(300e9).name == "l40s"  # a T4 reads 320 GB/s
