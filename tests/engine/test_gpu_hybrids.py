"""Models with a state beside KV, on a GPU."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from engines import make_prompts, run
from hybrid_prompts import ROOM, TOKENS, found, make_prompt, note_logits
from paged import difference, gather, paged_logits
from tiny_models import HYBRID_FAMILIES, WIDE, make_model

from hotset.attention import state_step
from hotset.attention.backend import AttentionBackend, RecordableBackend
from hotset.attention.choice import choose_backend
from hotset.attention.state_tables import GRID
from hotset.engine.engine import Engine
from hotset.executor.probe import inspect_model
from hotset.memory.arena import DeviceArena

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
# Of each kind of state, with heads that FlashInfer attends to.
RECORDED: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"head_dim": 128},
    "qwen3_next": {"head_dim": 128},
    "falcon_h1": {"head_dim": 128},
    "lfm2": {"head_dim": 128},
    "kimi_linear": WIDE,
    "jamba": {"head_dim": 128},
}
# Without experts, which a rounding may change the choice of.
DENSE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"mlp_only_layers": [0, 1, 2, 3]},
    "kimi_linear": {"mlp_layer_types": ["dense"] * 4},
    "jamba": {"num_experts": 1},
}


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_gpu_answers_as_the_cpu_does_in_float32(
    family: str, make_engine: Callable[..., Engine]
) -> None:
    prompts = make_prompts()
    expected = run(make_engine(family), prompts)
    eager = {"device": "cuda", "eager": True}
    engine = make_engine(family, max_num_batched_tokens=24, **eager)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 4:
            engine.scheduler._preempt_last()

    assert run(engine, prompts, each_step=preempt_one) == expected
    assert engine.metrics.preemptions > 0
    long = [prompts[0] + prompts[2] + prompts[4] + prompts[1]]
    assert len(long[0]) > 64
    answer = run(make_engine(family, max_model_len=200), long)
    engine = make_engine(family, max_model_len=200, hot_blocks=400, max_num_seqs=4, **eager)
    for _ in range(2):
        assert run(engine, long) == answer
    assert engine.metrics.cached_tokens.total() >= 64
    assert not engine.is_warming


@pytest.mark.parametrize("family", RECORDED)
def test_in_bfloat16_kernels_compute_launched_and_recorded_what_pytorch_does_in_float32(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = RECORDED[family] | DENSE.get(family, {})
    model = make_model(family, **changes).to("cuda", torch.bfloat16)
    layout = inspect_model(model)
    twin = deepcopy(model).float().cpu()
    exact_layout = inspect_model(twin)
    true = torch.cat(paged_logits(twin, exact_layout, gather(exact_layout))).cuda()
    with monkeypatch.context() as patched:
        patched.setattr(state_step, "has_kernels", lambda device: False)
        expected = paged_logits(model, layout, gather(layout))

    def backend(arena: DeviceArena) -> AttentionBackend:
        found = choose_backend(arena, layout.layers, max_context=60)
        assert isinstance(found, RecordableBackend)
        return found

    for recorded in (False, True):
        got = paged_logits(model, layout, backend, recorded=recorded)
        # Two ways to round one model differ from it by up to 1.4 times each other, by chance.
        one, other = (difference(true, torch.cat(each)) for each in (expected, got))
        assert other <= 2 * one


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("family", RECORDED)
def test_a_hit_on_the_grid_has_the_logits_of_a_cold_run_bit_for_bit(
    family: str, eager: bool, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(
        family,
        **ROOM,
        model_dtype=torch.bfloat16,
        model_changes=RECORDED[family],
        kv_bytes=2,
        device="cuda",
        eager=eager,
        max_num_batched_tokens=GRID,
        block_size=GRID,
    )
    assert (engine.executor.runner._graphs is None) == eager  # type: ignore[attr-defined]
    prompt = make_prompt(150)
    cold = note_logits(engine)
    answer = run(engine, [prompt], max_tokens=TOKENS)
    hot = note_logits(engine)
    assert run(engine, [prompt], max_tokens=TOKENS) == answer
    assert found(engine) == 2 * GRID
    assert len(hot) >= TOKENS
    for one, other in zip(cold[:TOKENS], hot, strict=False):
        assert torch.equal(one, other)
