"""States in host memory and on disk come back with the logits of a cold run, bit for bit."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run
from hybrid_prompts import KINDS, ROOM, TOKENS, make_prompt, note_logits
from schedulers import make_request
from tiny_models import HYBRID_FAMILIES

from hotset.attention.state_tables import GRID
from hotset.engine.engine import Engine

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
    cold = note_logits(engine)
    prompt, other = make_prompt(131), make_prompt(131, seed=9)
    run(engine, [prompt], max_tokens=1)
    run(engine, [other], max_tokens=1)
    forget_device(engine)
    plant(engine, other, prompt)
    hot = note_logits(engine)
    run(engine, [prompt], max_tokens=1)
    assert engine.metrics.state_hits == Counter(host=1)
    assert not torch.allclose(cold[0], hot[0], rtol=1e-2, atol=1e-2)


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
