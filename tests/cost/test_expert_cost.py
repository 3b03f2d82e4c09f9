"""Steps and throughput with experts in host memory, and the split of memory that follows."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.cost.calibration import Calibration
from hotset.cost.catalog import load_model
from hotset.cost.expert_split import KVMemory, Split, Splitter, least_bytes
from hotset.cost.expert_steps import ExpertCost, ExpertLink, Load, link_of
from hotset.cost.hardware import load_hardware
from hotset.cost.routing import Routing
from hotset.cost.slot_bytes import SlotBytes
from hotset.cost.step_time import CostModel
from hotset.layout import Layout

GIB = 2**30
PLANS = ["auto", "cache", "stream"]


def chip(model: str = "qwen3-30b-a3b") -> CostModel:
    return CostModel(
        load_model(model), load_hardware("h200"), Layout(), "bf16", Calibration(), Routing()
    )


QWEN = chip()
PAYLOAD_BYTES = QWEN.shape.expert_bytes_each
NUM_LAYERS, NUM_EXPERTS = 48, 128


def cost_of(plan: str = "auto", gb_per_s: float = 50.0, **link: float) -> ExpertCost:
    rates = {
        "cold_bytes": PAYLOAD_BYTES,
        "gather_bytes_per_s": gb_per_s * 1e9,
        "copy_bytes_per_s": gb_per_s * 1e9,
    }
    return ExpertCost(QWEN, ExpertLink(**{**rates, **link}), plan)


def slots_of(plan: str = "auto") -> SlotBytes:
    return SlotBytes(plan, NUM_LAYERS, NUM_EXPERTS, PAYLOAD_BYTES)


KV = KVMemory(16 * QWEN.shape.kv_bytes_per_token("bf16"), 16, fewest_blocks=16)


def solve(gib: float, load: Load, plan: str = "auto", target: str = "throughput") -> Split:
    slots = slots_of(plan)
    split = Splitter(
        int(gib * GIB), cost_of(plan), slots, KV, target, 8192, slots.fewest, NUM_EXPERTS
    ).solve(load)
    assert split is not None
    return split


def test_a_step_of_16_users_moves_what_the_worked_example_says() -> None:
    # Qwen3-30B-A3B in bf16: 82 distinct experts a layer, two thirds of them in host memory.
    cost = cost_of("cache")
    assert cost.distinct(16) == pytest.approx(82, abs=0.5)
    step = cost.decode_step(NUM_EXPERTS // 3, users=16, context=640)
    assert step.moved_bytes == pytest.approx(24.5e9, rel=0.03)
    assert step.seconds - step.chip_s == pytest.approx(0.49, rel=0.03)


def test_prompts_of_8192_tokens_stream_what_is_missing_once() -> None:
    # 40 GB once in 0.8 s; vLLM took 7.75 s.
    step = cost_of().prompt_step(40, 8192, Load(16, 512, 256))
    assert step.plan == "stream"
    assert step.moved_bytes == pytest.approx(40e9, rel=0.01)
    assert step.seconds == pytest.approx(0.8, rel=0.02)


def test_the_link_of_an_h200_is_as_measured() -> None:
    link = link_of(QWEN)
    assert link.copy_bytes_per_s == pytest.approx(54.6e9, rel=0.01)
    assert link.gather_bytes_per_s == pytest.approx(51e9, rel=0.01)
    assert link.cold_bytes == 3 * 2048 * 768 * 2


def test_a_stream_is_hidden_behind_compute_where_that_takes_longer() -> None:
    step = cost_of("stream", gb_per_s=5000).decode_step(120, 256, 2048)
    assert step.chip_s < step.seconds < step.chip_s * (1 + 1 / NUM_LAYERS)


def test_auto_takes_the_cheaper_plan_of_each_step() -> None:
    for num_slots, users in itertools.product((1, 40, 100, 127), (1, 4, 16, 64, 256)):
        times = {p: cost_of(p).decode_step(num_slots, users, 640).seconds for p in PLANS}
        assert times["auto"] == min(times["cache"], times["stream"])


def test_with_narrower_copies_the_same_step_moves_less() -> None:
    wide, narrow = cost_of("cache"), cost_of("cache", cold_bytes=PAYLOAD_BYTES / 2)
    one, other = (cost.decode_step(40, 16, 640) for cost in (wide, narrow))
    assert other.moved_bytes == one.moved_bytes / 2
    assert other.seconds - other.chip_s == pytest.approx((one.seconds - one.chip_s) / 2)


def test_a_measured_hit_rate_replaces_the_uniform_one() -> None:
    uniform = cost_of("cache").decode_step(32, 16, 640)
    same = cost_of("cache", hit_rate=0.25).decode_step(32, 16, 640)
    skewed = cost_of("cache", hit_rate=0.35).decode_step(32, 16, 640)
    assert same == uniform
    assert skewed.moved_bytes == pytest.approx(uniform.moved_bytes * 0.65 / 0.75)
    # No more than there are slots can be found.
    full = cost_of("cache", hit_rate=1.0).decode_step(32, 256, 640)
    assert full.moved_bytes == pytest.approx(
        (cost_of().distinct(256) - 32) * NUM_LAYERS * PAYLOAD_BYTES
    )


def test_all_requests_of_a_burst_take_one_pass_after_another_then_decode() -> None:
    served = cost_of().serve(
        40, Load(256, 512, 32, num_requests=256), kv_tokens=1e6, max_step_tokens=8192
    )
    assert (served.at_once, served.prompt_steps, served.decode_steps) == (256, 16, 31)
    halved = cost_of().serve(
        40, Load(256, 512, 32, num_requests=256), kv_tokens=1e6, max_step_tokens=4096
    )
    assert halved.prompt_s == pytest.approx(2 * served.prompt_s, rel=0.05)


def test_requests_beyond_the_kv_run_in_waves() -> None:
    load = Load(256, 512, 256, num_requests=256)
    served = cost_of().serve(40, load, kv_tokens=64 * 768, max_step_tokens=8192)
    assert served.at_once == 64
    assert served.prompt_steps == 16
    # Four waves of 256 steps; the prompts of the later ones come beside decodes.
    assert served.prompt_steps + served.decode_steps == 4 + 4 * 256 - 1


NUM_SLOTS = st.integers(1, NUM_EXPERTS)
LOADS = st.builds(
    Load,
    users=st.integers(1, 512),
    prompt_tokens=st.integers(1, 4096),
    output_tokens=st.integers(1, 1024),
    num_requests=st.sampled_from([None, 1, 64, 1000]),
)


@given(st.sampled_from(PLANS), NUM_SLOTS, NUM_SLOTS, st.integers(1, 512), st.integers(2, 8192))
def test_more_slots_never_make_a_step_longer(
    plan: str, one: int, other: int, users: int, context: int
) -> None:
    fewer, more = sorted((one, other))
    cost = cost_of(plan)
    slow, fast = (cost.decode_step(n, users, context) for n in (fewer, more))
    assert fast.seconds <= slow.seconds * (1 + 1e-9)
    assert fast.seconds >= fast.chip_s
    if plan != "auto":
        assert fast.moved_bytes <= slow.moved_bytes


@given(st.sampled_from(PLANS), NUM_SLOTS, st.floats(1, 1000), st.floats(1, 4))
def test_a_faster_link_never_makes_a_step_longer(
    plan: str, num_slots: int, gb_per_s: float, factor: float
) -> None:
    slow = cost_of(plan, gb_per_s).decode_step(num_slots, 64, 640)
    fast = cost_of(plan, gb_per_s * factor).decode_step(num_slots, 64, 640)
    assert fast.seconds <= slow.seconds * (1 + 1e-9)


@settings(deadline=None)
@given(LOADS, NUM_SLOTS, st.floats(1e3, 1e7), st.floats(1, 3), st.integers(256, 16384))
def test_more_kv_never_serves_less(
    load: Load, num_slots: int, kv_tokens: float, factor: float, max_step_tokens: int
) -> None:
    less, more = (
        cost_of().serve(num_slots, load, kv_tokens=tokens, max_step_tokens=max_step_tokens)
        for tokens in (kv_tokens, kv_tokens * factor)
    )
    assert more.output_tokens_per_s >= less.output_tokens_per_s * (1 - 1e-9)
    assert 1 <= less.at_once <= max(1, load.users)


@settings(deadline=None, max_examples=25)
@given(
    st.floats(6, 80),
    st.sampled_from(PLANS),
    st.sampled_from([1, 16, 256]),
    st.sampled_from([32, 256]),
    st.sampled_from(["throughput", "latency"]),
)
def test_no_other_split_is_better(
    gib: float, plan: str, users: int, output: int, target: str
) -> None:
    load = Load(users, 512, output)
    found = solve(gib, load, plan, target)
    slots = slots_of(plan)
    assert found.expert_bytes == slots(found.num_slots)
    assert found.expert_bytes + found.kv_bytes == int(gib * GIB)
    # Every number of slots, with all that is left for KV and with less.
    for num_slots in range(slots.fewest, NUM_EXPERTS + 1):
        left = (int(gib * GIB) - slots(num_slots)) // KV.block_bytes
        for num_blocks in {left, left * 2 // 3, left // 3}:
            if num_blocks < KV.fewest_blocks:
                continue
            tokens = KV.capacity(num_blocks, load)
            other = cost_of(plan).serve(num_slots, load, kv_tokens=tokens, max_step_tokens=8192)
            if target == "throughput":
                assert other.output_tokens_per_s <= found.served.output_tokens_per_s * (1 + 1e-9)
            elif other.at_once == found.served.at_once:
                assert other.decode_step.seconds >= found.served.decode_step.seconds * (1 - 1e-9)
            else:
                assert other.at_once < found.served.at_once


def test_a_long_queue_gets_kv_first_and_a_few_users_slots() -> None:
    queue, few = solve(36, Load(256, 1024, 256)), solve(36, Load(8, 1024, 256))
    assert queue.kv_bytes > 4 * queue.expert_bytes
    assert few.expert_bytes > 4 * few.kv_bytes
    assert queue.served.at_once == pytest.approx(256)
    quick = solve(36, Load(8, 1024, 256), target="latency")
    assert quick.num_slots >= few.num_slots
    assert quick.served.at_once == 8


def test_room_for_all_experts_and_the_kv_leaves_nothing_in_host_memory() -> None:
    all_bytes = slots_of()(NUM_EXPERTS)
    for load in (Load(256, 1024, 256), Load(8, 1024, 256)):
        kv_bytes = KV.blocks_of(load.context) * load.users * KV.block_bytes
        for target in ("throughput", "latency"):
            split = solve((all_bytes + kv_bytes) / GIB, load, target=target)
            assert split.num_slots == NUM_EXPERTS
            assert split.served.decode_step.plan == "resident"


@pytest.mark.parametrize("plan", PLANS)
def test_the_least_that_can_be_split_can_and_less_cannot(plan: str) -> None:
    least = least_bytes(slots_of(plan), KV, slots_of(plan).fewest)
    for total, fits in ((least, True), (least - 1, False)):
        slots = slots_of(plan)
        splitter = Splitter(
            total, cost_of(plan), slots, KV, "throughput", 512, slots.fewest, NUM_EXPERTS
        )
        assert (splitter.solve(Load(1, 64, 64)) is not None) == fits


def test_blocks_are_whole() -> None:
    load = Load(4, 17, 1)
    kv = replace(KV, block_size=16)
    assert kv.blocks_of(16) == 1 and kv.blocks_of(17) == 2
    assert kv.capacity(8, load) == 4 * load.context
