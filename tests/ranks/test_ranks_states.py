"""Layers that keep a state, over two ranks: each has its heads' part, and tiers have it too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import reference, run
from hybrid_prompts import ROOM, TOKENS, make_prompt

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
# Short convolutions, both delta rules, and Mamba-2 with and without a norm over all heads.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("lfm2_moe", {}),
    ("qwen3_next", {}),
    ("qwen3_5_text", {}),
    ("kimi_linear", {}),
    ("nemotron_h", {}),
    ("falcon_h1", {"mamba_n_groups": 1}),
    ("granitemoehybrid", {"mamba_n_groups": 1}),
]


def settle(engine: Engine) -> None:
    """Wait until no copy is under way nor due."""
    assert engine.tiers is not None and engine.kv.states is not None
    while engine.tiers.is_busy or engine.kv.states._due:
        engine.kv.poll()
        engine.tiers.flush()
        engine.tiers.wait(0.01)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param(name, changes, id=name, marks=pytest.mark.many if number > 3 else ())
        for number, (name, changes) in enumerate(FAMILIES)
    ],
)
def test_states_that_come_back_from_host_memory_and_preemptions_do_not_matter(
    family: str, changes: dict[str, Any], make_ranked: MakeEngine
) -> None:
    prompts = [make_prompt(150), make_prompt(131, seed=1), make_prompt(9, seed=2)]
    expected = reference(family, prompts, max_tokens=TOKENS, **changes)
    engine = make_ranked(family, **SIZES, model_changes=changes)
    assert run(engine, prompts, max_tokens=TOKENS) == expected
    settle(engine)
    assert engine.kv.states is not None
    engine.kv.pool.forget_cached()
    engine.kv.states.slots.pool.forget_cached()

    def preempt() -> None:
        if any(request.kv.awaited is None for request in engine.scheduler.running):
            engine.scheduler._preempt_last()

    # In slots and blocks that others have written to since.
    assert run(engine, prompts[::-1], max_tokens=TOKENS, each_step=preempt) == expected[::-1]
    assert engine.metrics.state_hits["host"] > 0
    assert engine.metrics.preemptions >= TOKENS
    assert engine.metrics.recomputed_tokens == 0


def test_states_on_disk_are_found_again_by_as_many_ranks(
    make_ranked: MakeEngine, tmp_path: Path
) -> None:
    prompts = [make_prompt(150)]
    expected = reference("qwen3_next", prompts, max_tokens=TOKENS)
    sizes = {**SIZES, "disk_mib": 8, "disk_path": tmp_path}
    first = make_ranked("qwen3_next", **sizes, overlap=True)
    assert run(first, prompts, max_tokens=TOKENS) == expected
    settle(first)
    first.close()

    second = make_ranked("qwen3_next", **sizes)
    assert run(second, prompts, max_tokens=TOKENS) == expected
    assert second.metrics.state_hits["disk"] == 1
