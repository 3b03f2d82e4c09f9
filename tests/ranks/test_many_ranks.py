"""Four and eight ranks on the CPU: the answers of one, and one line where one of them fails.

Each starts as many processes; `pytest -m many tests/ranks` runs them.
"""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from engines import make_prompts, reference, run
from rank_engines import BAD_TOKEN, build_failing_wide, make_ranked_engine
from test_rank_failures import LONG, is_running, ranks_of, wait_until

from hotset.engine.completion import gather
from hotset.engine.engine import Engine
from hotset.engine.service import EngineService
from hotset.errors import EngineError
from hotset.layout import Layout
from hotset.options import Options
from hotset.ranks.driver import Ranks

pytestmark = pytest.mark.many

WIDE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8}
FAMILIES = [
    ("llama", WIDE),
    ("llama", {**WIDE, "num_key_value_heads": 2}),  # a KV head on several ranks
    ("qwen3_moe", WIDE),
    ("mixtral", WIDE),
    ("deepseek_v3", WIDE),
]
STARVED = {"hot_blocks": 26, "host_blocks": 300, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module", params=[4, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(Layout(request.param), "cpu", step_timeout_s=120.0)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_all_answer_as_transformers_does(
    family: str, changes: dict[str, Any], ranks: Ranks
) -> None:
    prompts = make_prompts()
    engine = make_ranked_engine(
        ranks, family, model_changes=changes, fetch_policy="fetch", overlap=True, **STARVED
    )
    try:
        check_answers(engine, reference(family, prompts, **changes))
    finally:
        engine.close()


def check_answers(engine: Engine, expected: list[list[int]]) -> None:
    """Two rounds, with a preemption before every other step; nothing is left."""
    steps = 0

    def preempt_one() -> None:
        nonlocal steps
        steps += 1
        if steps % 2 and len(engine.scheduler.running) > 1:
            engine.scheduler._preempt_last()

    for _ in range(2):
        assert run(engine, make_prompts(), each_step=preempt_one) == expected
    assert engine.metrics.preemptions > 5
    assert engine.metrics.cached_tokens["host"] > 0
    assert engine.kv.pool.num_held == 0


def test_experts_in_host_memory_do_not_matter(ranks: Ranks) -> None:
    changes = {**WIDE, "moe_intermediate_size": 128}
    engine = make_ranked_engine(ranks, "qwen3_moe", model_changes=changes, expert_slots=2)
    try:
        prompts = make_prompts()
        assert run(engine, prompts) == reference("qwen3_moe", prompts, **changes)
        engine.take_counts()
        assert engine.metrics.expert_bytes > 0
    finally:
        engine.close()


@pytest.fixture(scope="module", params=[4, 8])
def service(request: pytest.FixtureRequest) -> Iterator[EngineService]:
    options = Options.of(
        tp=request.param, device="cpu", hot_gib=0.01, max_model_len=500, step_timeout_s=5.0
    )
    service = EngineService(options, build=build_failing_wide)
    yield service
    children = ranks_of(service)
    service.close()
    assert not any(is_running(pid) for pid in children)


@pytest.mark.parametrize("fault", ["killed", "raises", "hangs"])
def test_a_rank_that_fails_is_named_and_all_serve_again(fault: str, service: EngineService) -> None:
    wait_until(lambda: service.healthy, 120.0)
    before = ranks_of(service)
    assert len(before) == service.options.layout.tp
    streams = [service.submit(prompt, LONG) for prompt in make_prompts()]
    next(iter(streams[0]))  # they run
    if fault == "raises":
        streams.append(service.submit([5, BAD_TOKEN, 7], LONG))
    else:
        os.kill(before[-1], signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    ended = [gather(stream, 1)[0] for stream in streams[1:]]
    [line] = {one.error for one in ended}
    assert line is not None and line.startswith("rank ") and "0" not in line.partition(":")[0]
    with pytest.raises(EngineError, match="rank "):
        service.submit([5], LONG)
    wait_until(lambda: service.healthy, 240.0)
    prompt = make_prompts()[0]
    [answer] = gather(service.submit(prompt, LONG), 1)
    assert answer.error is None
    wait_until(lambda: not any(is_running(pid) for pid in before), 20.0)
