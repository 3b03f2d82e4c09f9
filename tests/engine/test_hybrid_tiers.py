"""States in host memory and on disk come back with the logits of a cold run, bit for bit."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_prompts, run
from hybrid_prompts import KINDS, ROOM, TOKENS, make_prompt, note_logits
from schedulers import make_request
from test_hybrid_equality import expected
from tiny_models import HYBRID_FAMILIES

from hotset.attention.state_tables import GRID
from hotset.engine.engine import Engine
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
SIZES: dict[str, Any] = {
    **ROOM,
    "block_size": GRID,
    "max_num_batched_tokens": GRID,
    "hot_blocks": 40,
    "host_blocks": 100,
    "fetch_policy": "fetch",
}
PROMPT = make_prompt(150)


def settle(engine: Engine) -> None:
    """Wait until no copy is under way nor due."""
    assert engine.tiers is not None and engine.kv.states is not None
    while engine.tiers.is_busy or engine.kv.states._due:
        engine.kv.poll()
        engine.tiers.flush()
        engine.tiers.wait(0.01)
    engine.kv.check()
    engine.tiers.check()


def forget_device(engine: Engine) -> None:
    """All that is known is in slower tiers."""
    settle(engine)
    assert engine.kv.states is not None
    engine.kv.pool.forget_cached()
    engine.kv.states.slots.pool.forget_cached()
    arena: Any = engine.executor.runner._states  # type: ignore[attr-defined]
    arena.memory[2:] = 255  # no number at all


def forget_host(engine: Engine) -> None:
    settle(engine)
    assert engine.tiers is not None
    for key in list(engine.tiers.host._payloads):
        engine.tiers.host.discard(key)


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_hit_in_host_memory_has_the_logits_of_a_cold_run_bit_for_bit(
    family: str, dtype: torch.dtype, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **SIZES, model_dtype=dtype)
    cold = note_logits(engine)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    forget_device(engine)
    hot = note_logits(engine)
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    assert engine.metrics.cached_tokens == Counter(host=2 * GRID)
    assert engine.metrics.state_hits == Counter(host=1)
    assert_equal(cold[:TOKENS], hot)


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_hit_on_disk_has_the_logits_of_a_cold_run_bit_for_bit(
    family: str, is_restarted: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    sizes = {**SIZES, "disk_mib": 8, "disk_path": tmp_path}
    engine = make_engine(family, **sizes)
    cold = note_logits(engine)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    forget_device(engine)
    forget_host(engine)
    if is_restarted:
        engine.close()
        engine = make_engine(family, **sizes)
    hot = note_logits(engine)
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    assert engine.metrics.cached_tokens == Counter(disk=2 * GRID)
    assert engine.metrics.state_hits == Counter(disk=1)
    assert_equal(cold[:TOKENS], hot)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_preempted_at_every_step_nothing_is_computed_again_and_no_bit_differs(
    family: str, overlap: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    sizes = {**SIZES, "disk_mib": 8, "disk_path": tmp_path, "prefix_caching": False}
    engine = make_engine(family, **sizes, overlap=overlap)
    whole = note_logits(engine)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    cut = note_logits(engine)

    def preempt() -> None:
        if any(request.kv.awaited is None for request in engine.scheduler.running):
            engine.scheduler._preempt_last()

    assert run(engine, [PROMPT], max_tokens=TOKENS, each_step=preempt) == answer
    assert engine.metrics.preemptions >= TOKENS
    assert engine.metrics.recomputed_tokens == 0
    assert engine.metrics.cached_tokens.total() == 0
    assert engine.metrics.resumed_tokens["host"] > 0
    assert_equal(whole[: len(cut)], cut)
    settle(engine)
    assert engine.kv.states is not None and engine.kv.states.slots.pool.num_held == 0
    assert engine.tiers is not None
    payloads = engine.tiers.host._payloads.values()
    assert payloads and all(payload.slowest != 0 for payload in payloads)  # none of its own


@pytest.mark.parametrize("family", KINDS)
def test_without_the_state_that_came_back_the_answer_is_another(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **SIZES)
    prompt, other = make_prompt(131), make_prompt(131, seed=9)
    [answer] = run(engine, [prompt], max_tokens=TOKENS)
    run(engine, [other], max_tokens=TOKENS)
    forget_device(engine)
    plant(engine, other, prompt)
    [planted] = run(engine, [prompt], max_tokens=TOKENS)
    assert engine.metrics.state_hits == Counter(host=1)
    num_changed = sum(one != other for one, other in zip(planted, answer, strict=True))
    assert num_changed >= (1 if family == "lfm2" else 8)


def plant(engine: Engine, source: list[int], target: list[int]) -> None:
    """Have the state of one prompt in host memory in place of another's."""
    assert engine.kv.states is not None and engine.kv.states._transfers is not None
    assert engine.tiers is not None
    slots = []
    for tokens in (source, target):
        key = engine.kv.prefixes.extend(make_request(tokens))[-1]
        pieces = engine.kv.states._transfers.keys(key)
        slots.append([engine.tiers.host_slot(piece) for piece in pieces])
    for one, other in zip(*slots, strict=True):
        assert one is not None and other is not None
        engine.tiers._memory.view(other)[:] = engine.tiers._memory.view(one)


def in_host(engine: Engine, num_tokens: int) -> list[int]:
    """Slots of host memory with the pieces of the state after `num_tokens` of the prompt."""
    assert engine.kv.states is not None and engine.kv.states._transfers is not None
    assert engine.tiers is not None
    key = engine.kv.prefixes.extend(make_request(PROMPT))[num_tokens // GRID - 1]
    slots = [engine.tiers.host_slot(piece) for piece in engine.kv.states._transfers.keys(key)]
    assert None not in slots
    return [slot for slot in slots if slot is not None]


@pytest.mark.parametrize("family", KINDS)
def test_a_state_with_a_damaged_piece_on_disk_is_computed_again_and_counted(
    family: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine(family, **SIZES, disk_mib=8, disk_path=tmp_path)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    forget_device(engine)
    disk: Any = engine.tiers.slower[0].tier  # type: ignore[union-attr]
    pieces = engine.kv.states._transfers.keys(  # type: ignore[union-attr]
        engine.kv.prefixes.extend(make_request(PROMPT))[1]
    )
    slot = disk._blocks[pieces[-1]].slot
    forget_host(engine)
    with open(next(tmp_path.rglob("*.slab"), tmp_path), "r+b") as slab:
        slab.seek(slot * disk.slot_bytes + 3)
        slab.write(bytes(range(40)))
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    faults = engine.metrics.faults
    assert faults["disk_corrupt"] == 1 and faults["state_lost"] == 1
    assert engine.metrics.cached_tokens.total() == 0
    assert engine.metrics.computed_tokens >= 2 * len(PROMPT)
    settle(engine)


@pytest.mark.parametrize("family", KINDS)
def test_a_state_that_lacks_a_piece_is_not_there(family: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family, **SIZES)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    forget_device(engine)
    assert engine.tiers is not None
    slots = in_host(engine, 2 * GRID)
    [key] = [p.key for p in engine.tiers.host._payloads.values() if p.slot == slots[-1]]
    engine.tiers.host.discard(key)
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    assert engine.metrics.cached_tokens.total() == 0
    assert engine.metrics.stateless_tokens == 2 * GRID
    settle(engine)
    assert in_host(engine, 2 * GRID)  # whole again


@pytest.mark.parametrize("family", KINDS)
def test_forked_outputs_have_the_logits_of_requests_of_their_own(
    family: str, make_engine: MakeEngine
) -> None:
    engine, others = make_engine(family, **SIZES), make_engine(family, **SIZES)
    prompt, num = make_prompt(2 * GRID + 1), 4
    run(others, [prompt], max_tokens=1)  # its state is found by all, so that they run side by side
    own, forked = note_logits(others), note_logits(engine)
    run(others, [prompt] * num, max_tokens=TOKENS)
    assert others.metrics.state_hits == Counter(device=num)
    engine.add_request(prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True, n=num))
    while engine.has_work:
        engine.step()
        engine.kv.check()
    assert engine.metrics.forked_tokens == (num - 1) * 2 * GRID
    own = [logits[-1] for logits in own if len(logits) == num]
    forked = [logits[-1] for logits in forked if len(logits) == num]
    assert len(own) >= len(forked) >= TOKENS - 1
    assert_equal(own[: len(forked)], forked)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_starved_tiers_change_no_token(
    family: str, overlap: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    sizes = {"block_size": 16, "hot_blocks": 16, "host_blocks": 50, "max_num_batched_tokens": 24}
    tiers = {"disk_mib": 4, "disk_path": tmp_path, "fetch_policy": "fetch"}
    engine = make_engine(family, **sizes, **tiers, overlap=overlap)
    assert engine.kv.states is not None and engine.kv.states.num_pieces > 0
    steps = itertools.count()

    def preempt_some() -> None:
        running = engine.scheduler.running
        if next(steps) % 3 == 0 and len(running) > 1 and running[-1].kv.awaited is None:
            engine.scheduler._preempt_last()

    for _ in range(2):
        assert run(engine, make_prompts(), each_step=preempt_some) == expected(family)
    metrics = engine.metrics
    assert metrics.preemptions > 10
    assert metrics.resumed_tokens["host"] + metrics.resumed_tokens["disk"] > 0
    assert metrics.fetched_states > 0
    settle(engine)
    assert engine.kv.states.slots.pool.num_held == 0


@pytest.mark.parametrize("family", KINDS)
def test_a_state_goes_down_only_where_fetching_it_is_sooner_than_computing(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **{**SIZES, "fetch_policy": "auto"})
    # One after the last line of the grid, and one where the request ends.
    for rate, num_spilled in ((1.0, 0), (1e12, 2)):
        engine.rates.link_bytes_per_s["host"] = rate
        run(engine, [PROMPT], max_tokens=TOKENS)
        settle(engine)
        engine.kv.states.slots.pool.forget_cached()  # type: ignore[union-attr]
        assert engine.metrics.spilled_states == num_spilled


def test_host_memory_below_two_states_has_none_and_says_so(make_engine: MakeEngine) -> None:
    changes = {"block_size": 4, "host_blocks": 20}
    engine = make_engine("bamba", **{**SIZES, **changes})
    assert engine.sizes.states is not None and engine.sizes.states.num_payloads > 10
    assert "none goes to host memory, which has 20 blocks" in engine.report
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    assert engine.metrics.spilled_states == 0 and engine.metrics.state_hits["device"] == 1
