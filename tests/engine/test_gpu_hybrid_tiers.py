"""States in host memory and on disk, on a GPU: the logits of a cold run, bit for bit."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run
from hybrid_prompts import TOKENS, make_prompt, note_logits
from test_gpu_hybrids import RECORDED
from test_hybrid_tiers import SIZES, MakeEngine, forget_device, forget_host, settle

from hotset.attention.state_tables import GRID
from hotset.engine.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
PROMPT = make_prompt(150)


def make(make_engine: MakeEngine, family: str, eager: bool, folder: Path) -> Engine:
    changes: dict[str, Any] = {
        **SIZES,
        "model_dtype": torch.bfloat16,
        "model_changes": RECORDED[family],
        "kv_bytes": 2,
        "device": "cuda",
        "eager": eager,
        "disk_mib": 64,
        "disk_path": folder,
    }
    return make_engine(family, **changes)


def assert_begins(cold: list[torch.Tensor], hot: list[torch.Tensor]) -> None:
    """Steps that overlap compute one token more, which is dropped."""
    assert len(cold) >= TOKENS and len(hot) >= TOKENS
    for one, other in zip(cold[:TOKENS], hot[:TOKENS], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("family", RECORDED)
def test_a_hit_in_host_memory_or_on_disk_has_the_logits_of_a_cold_run_bit_for_bit(
    family: str, eager: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make(make_engine, family, eager, tmp_path)
    cold = note_logits(engine)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    forget_device(engine)
    from_host = note_logits(engine)
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    assert engine.metrics.cached_tokens == Counter(host=2 * GRID)
    assert_begins(cold, from_host)
    forget_device(engine)
    forget_host(engine)
    engine.close()
    engine = make(make_engine, family, eager, tmp_path)
    from_disk = note_logits(engine)
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    assert engine.metrics.cached_tokens == Counter(disk=2 * GRID)
    assert engine.metrics.state_hits == Counter(disk=1)
    assert_begins(cold, from_disk)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("family", RECORDED)
def test_preempted_at_every_step_nothing_is_computed_again_and_no_bit_differs(
    family: str, eager: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make(make_engine, family, eager, tmp_path)
    whole = note_logits(engine)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    other = make_prompt(150, seed=3)
    cold = note_logits(engine)
    expected = run(engine, [other], max_tokens=TOKENS)
    settle(engine)
    engine.kv.pool.forget_cached()
    assert engine.kv.states is not None and engine.tiers is not None
    engine.kv.states.slots.pool.forget_cached()
    engine.tiers.discard([key for key in list(engine.tiers.host._payloads)])
    cut = note_logits(engine)

    def preempt() -> None:
        if any(request.kv.awaited is None for request in engine.scheduler.running):
            engine.scheduler._preempt_last()

    assert run(engine, [PROMPT], max_tokens=TOKENS, each_step=preempt) == answer
    assert_begins(whole, cut)
    again = note_logits(engine)
    assert run(engine, [other], max_tokens=TOKENS, each_step=preempt) == expected
    assert_begins(cold, again)
    assert engine.metrics.preemptions >= 2 * TOKENS
    assert engine.metrics.recomputed_tokens == 0
    assert engine.metrics.resumed_tokens["host"] > 0
    settle(engine)
    assert engine.kv.states.slots.pool.num_held == 0
