"""What each part gets of the memory, as a function of plain numbers. Needs no torch."""

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from hotset.cost.slot_bytes import SlotBytes
from hotset.engine.model_sizes import ModelSizes
from hotset.engine.sizing import FreeBytes, Sizes, solve_sizes
from hotset.errors import ConfigError
from hotset.options import Options
from hotset.units import GIB, gib_text, round_up_gib

MIB = 2**20
DENSE = ModelSizes(
    device="cpu",
    max_len=8192,
    kv_bytes_per_token=1024,
    block_size=16,
    workspace_bytes=MIB,
    dense_bytes=GIB,
)
# 2 layers of 8 experts of 16 MiB: 256 MiB.
SLOTS = SlotBytes("cache", 2, 8, 16 * MIB)
MOE = replace(
    DENSE,
    device="cuda",
    expert_bytes=256 * MIB,
    device_expert_bytes=256 * MIB,
    num_experts=8,
    top_k=2,
    slots=SLOTS,
    why_not_hosted="",
)


def sizes(model: ModelSizes = DENSE, *, free_gib: float = 4.0, **given: Any) -> Sizes:
    options = Options.of(**{"max_model_len": 1024, **given})
    return solve_sizes(options, model, FreeBytes(int(free_gib * GIB), int(8 * GIB)))


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, hotset.engine.sizing; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_hot_tier_too_small_is_refused_with_the_smallest_that_works() -> None:
    with pytest.raises(ConfigError, match="holds 32 KV blocks") as refused:
        sizes(hot_gib=0.0005)
    smallest = float(str(refused.value).split("give hot_gib ")[1].split()[0])
    assert sizes(hot_gib=smallest).device_blocks == 64
    with pytest.raises(ConfigError):
        sizes(hot_gib=smallest * 0.98)


def test_a_total_too_small_for_one_request_is_refused_with_the_smallest_that_works() -> None:
    total_gib = 1.0 + 1.5 / 1024
    with pytest.raises(ConfigError, match="holds 32 KV blocks") as refused:
        sizes(total_gib=total_gib)
    smallest = float(str(refused.value).split("give total_gib ")[1].split()[0])
    assert sizes(total_gib=smallest).device_blocks == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"hot_gib": 9.0},
            "hot_gib 9.0 asks for 9.000 GiB of KV, which is more than the 3.999 GiB free",
        ),
        ({"total_gib": 9.0}, "total_gib 9.0 asks for 8.000 GiB"),
        ({"total_gib": 0.5}, "total_gib is 0.5, but what is not split takes 1.001 GiB"),
        ({"hot_gib": 0.1, "host_gib": 1e-6}, "host_gib 1e-06 holds no KV block"),
        ({"hot_gib": 0.1, "host_gib": 1e6}, "give less host_gib"),
        ({"hot_gib": 0.1, "disk_gib": 1e-6}, "disk_gib 1e-06 holds no KV block"),
        ({"expert_slots": 2}, "expert_slots is 2, but it is dense; leave expert_slots out"),
        (
            {"hot_gib": 1.0, "target": "latency"},
            "target is 'latency', but it is dense; leave",
        ),
    ],
)
def test_sizes_that_cannot_work_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        sizes(**given)


def test_a_step_that_takes_all_memory_is_refused() -> None:
    model = replace(DENSE, workspace_bytes=4 * GIB)
    with pytest.raises(ConfigError, match="a step of 2048 tokens and 256 requests may"):
        sizes(model)


def test_without_a_size_kv_gets_a_share_but_no_more_than_can_be_used() -> None:
    free = 4 * GIB - MIB
    assert sizes(max_num_seqs=2**20).device_blocks == int(free * 0.25) // (16 * 1024)
    gpu = replace(DENSE, device="cuda")
    assert sizes(gpu, max_num_seqs=2**20).device_blocks == int(free * 0.9) // (16 * 1024)
    assert sizes(max_num_seqs=4).device_blocks == 4 * 1024 // 16
    assert sizes(max_num_seqs=4).max_model_len == 1024
    assert sizes(hot_gib=1.0, max_model_len=None).max_model_len == 8192


def test_experts_that_leave_the_device_make_room_and_slots_take_some() -> None:
    beside = sizes(MOE, expert_slots=2, max_num_seqs=2**20)
    assert beside.experts is not None and beside.expert_bytes == SLOTS(2) == 64 * MIB
    free = 4 * GIB + 256 * MIB - 64 * MIB - MIB
    assert beside.device_blocks == int(free * 0.9) // (16 * 1024)
    assert beside.weights_bytes == GIB
    # Loaded in host memory, they have left the device already.
    away = replace(MOE, device_expert_bytes=0)
    free = 4 * GIB - 64 * MIB - MIB
    beside = sizes(away, expert_slots=2, max_num_seqs=2**20)
    assert beside.device_blocks == int(free * 0.9) // (16 * 1024)
    # On a CPU the copy in host memory is of the same memory.
    beside = sizes(replace(MOE, device="cpu"), expert_slots=2, max_num_seqs=2**20)
    assert beside.device_blocks == int(free * 0.25) // (16 * 1024)


def test_all_experts_in_slots_are_weights() -> None:
    here = sizes(MOE, expert_slots=8)
    assert here.experts is not None and here.experts.are_resident
    assert here.expert_bytes == 0 and here.weights_bytes == GIB + 256 * MIB
    assert sizes(MOE).weights_bytes == GIB + 256 * MIB
    away = replace(MOE, device_expert_bytes=0)
    with pytest.raises(ConfigError, match="more than the"):
        sizes(away, expert_slots=8, hot_gib=3.8)
    assert sizes(MOE, expert_slots=8, hot_gib=3.8).device_blocks


def test_experts_that_host_memory_has_no_room_for_are_on_disk_and_do_not_stream() -> None:
    model = replace(MOE, slots=replace(SLOTS, plan="auto"))
    on_disk = sizes(model, expert_slots=2, expert_host_gib=5 * 16 / 1024).experts
    assert on_disk is not None
    assert (on_disk.host_slots, on_disk.slots.plan) == (5, "cache")
    assert on_disk.host_bytes == 5 * 16 * MIB and on_disk.device_bytes == SLOTS(2)
    in_memory = sizes(model, expert_slots=2, expert_host_gib=1.0).experts
    assert in_memory is not None and in_memory.host_slots is None
    assert in_memory.slots.plan == "auto" and in_memory.host_bytes == 256 * MIB


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"expert_slots": 9}, "expert_slots is 9, but a layer has 8 experts"),
        ({"expert_gib": 0.01}, "expert_gib 0.01 holds too little: the plan cache needs 0.03125 or"),
        ({"expert_slots": 8, "expert_cold_dtype": "fp8"}, "fp8, which does nothing while all"),
        ({"expert_slots": 2, "expert_prefetch": 3}, "expert_prefetch is 3, but a layer keeps 2"),
        ({"expert_slots": 2, "expert_host_gib": 0.02}, "holds 1 experts of this model; at least 2"),
        (
            {"expert_slots": 2, "expert_host_gib": 0.1, "expert_prefetch": 1},
            "expert_prefetch is 1, but expert_host_gib 0.1 leaves experts on disk",
        ),
        (
            {"expert_slots": 2, "expert_host_gib": 0.1, "expert_cpu": "auto"},
            "expert_cpu is 'auto', but expert_host_gib 0.1 leaves experts on disk",
        ),
        (
            {"expert_slots": 2, "expert_host_gib": 0.1, "expert_plan": "stream"},
            "expert_plan is 'stream', which copies whole layers from host memory",
        ),
        (
            {"expert_slots": 2, "expert_host_gib": 0.1, "expert_cold_dtype": "fp8"},
            "what is on disk is not rounded",
        ),
    ],
)
def test_options_of_experts_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        sizes(MOE, **given)


def test_a_step_of_prompts_beside_decodes_is_larger_where_experts_want_rows() -> None:
    assert sizes().max_mixed_tokens == 256
    assert sizes(max_mixed_tokens=7).max_mixed_tokens == 7
    assert sizes(replace(DENSE, device="cuda")).max_mixed_tokens == 1024
    assert sizes(MOE, max_num_batched_tokens=8192).max_mixed_tokens == 512 * 8 // 2
    assert sizes(MOE, max_num_batched_tokens=8192, expert_slots=2).max_mixed_tokens == 8192
    rotating = sizes(MOE, max_num_batched_tokens=4096, rotation_s=1.0, host_gib=1.0)
    assert rotating.max_mixed_tokens == 4096


def test_gib_are_rounded_up_for_what_to_give_and_down_for_what_there_is() -> None:
    assert round_up_gib(1) == 1e-6 and round_up_gib(GIB) == 1.0
    assert gib_text(GIB + 1) == "1.001 GiB" and gib_text(GIB + 1, up=False) == "1.000 GiB"
    assert gib_text(GIB - 1) == "1.000000 GiB" and gib_text(GIB // 2, up=False) == "0.500000 GiB"
