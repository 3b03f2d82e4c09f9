"""Two ranks that attend for their own requests and share experts answer what one does."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from engines import make_prompts, reference, run

from hotset.engine.engine import Engine
from hotset.layout import Layout
from hotset.metrics import Metrics
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
RunOne = Callable[..., tuple[list[list[int]], Metrics]]

FAMILY = "qwen3_moe"
# Of each lane; tokens and sequences are of both.
STARVED = {"hot_blocks": 26, "max_num_batched_tokens": 48}


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(dp=2, es=2)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return reference(FAMILY, make_prompts(num=12))


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3"]
)
def test_each_architecture_answers_as_transformers_does(
    family: str, make_ranked: MakeEngine
) -> None:
    prompts = make_prompts()
    engine = make_ranked(family, hot_blocks=60, max_num_batched_tokens=40)
    assert run(engine, prompts) == reference(family, prompts)
    assert all(lane.kv.pool.num_cached for lane in engine.lanes)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"overlap": True},
        {**STARVED, "overlap": True},
        {**STARVED, "host_blocks": 300, "fetch_policy": "fetch", "overlap": True},
        {**STARVED, "host_blocks": 300, "fetch_policy": "fetch"},
        {"model_changes": {"vocab_size": 257}},
        {"model_changes": {"tie_word_embeddings": True}},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_sizes_and_tiers_do_not_matter(
    changes: dict[str, Any], make_ranked: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_ranked(FAMILY, **changes)
    for lane in engine.lanes:
        lane.scheduler.ahead_tokens = 1  # so that some are preempted
    prompts = make_prompts(num=12)
    of_model = changes.get("model_changes")
    wanted = expected if of_model is None else reference(FAMILY, prompts, **of_model)
    for _ in range(3):  # later rounds find prefixes in all tiers
        assert run(engine, prompts) == wanted
    if "hot_blocks" in changes:
        assert engine.metrics.preemptions > 0
    if "host_blocks" in changes:
        assert engine.metrics.cached_tokens["host"] > 0
    assert engine.metrics.cached_tokens["device"] > 0


def test_a_preemption_before_every_step_does_not_matter(
    make_ranked: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_ranked(FAMILY, host_blocks=300, max_num_batched_tokens=48)

    def preempt_one() -> None:
        for lane in engine.lanes:
            if len(lane.scheduler.running) > 1:
                lane.scheduler._preempt_last()

    assert run(engine, make_prompts(num=12), each_step=preempt_one) == expected
    assert engine.metrics.preemptions > 10


def test_a_lane_without_work_takes_part(make_ranked: MakeEngine, expected: list[list[int]]) -> None:
    engine = make_ranked(FAMILY, overlap=True)
    for prompt, answer in zip(make_prompts(), expected, strict=False):
        assert run(engine, [prompt]) == [answer]
    used = [lane.kv.pool.num_cached > 0 for lane in engine.lanes]
    assert used == [True, False]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8, "seed": 3, "top_p": 0.9},
        {"presence_penalty": 0.5, "logit_bias": {7: 3.0}},
        {"prompt_logprobs": 1, "logprobs": 1},
    ],
    ids=lambda params: "-".join(params),
)
def test_tokens_are_chosen_as_on_one_rank(
    params: dict[str, Any], make_ranked: MakeEngine, run_one: RunOne
) -> None:
    wanted, _ = run_one(FAMILY, params=params)
    assert run(make_ranked(FAMILY, overlap=True), make_prompts(), **params) == wanted


@pytest.mark.many
def test_requests_that_come_and_go_leave_nothing(make_ranked: MakeEngine) -> None:
    engine = make_ranked(
        FAMILY, hot_blocks=26, host_blocks=60, max_num_batched_tokens=32, overlap=True
    )
    rng = random.Random(0)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    open_ids: set[str] = set()
    for _ in range(200):
        if rng.random() < 0.4:
            prompt = rng.choices(range(3, 256), k=rng.randint(1, 60))
            open_ids.add(engine.add_request(prompt, params))
        if open_ids and rng.random() < 0.15:
            engine.abort(rng.choice(sorted(open_ids)))
        for output in engine.step():
            assert output.error is None
            if output.finish_reason is not None:
                open_ids.discard(output.request_id)
        for lane in engine.lanes:
            lane.kv.check()
    while engine.has_work or engine.has_transfers:
        engine.step()
    assert engine.metrics.requests_finished.total() > 20
    assert [lane.kv.pool.num_held for lane in engine.lanes] == [0, 0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"expert_plan": "stream"}, {"expert_cold_dtype": "fp8"}, {"expert_cold_dtype": "int4"}],
)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_host_memory_do_not_matter(
    family: str, changes: dict[str, Any], make_ranked: MakeEngine, run_one: RunOne
) -> None:
    prompts = make_prompts()
    wide = {"model_changes": {"moe_intermediate_size": 128, "intermediate_size": 128}}
    wanted, _ = run_one(family, expert_slots=2, **changes, **wide)
    engine = make_ranked(family, expert_slots=2, **changes, **wide)
    assert run(engine, prompts) == wanted
    engine.take_counts()
    assert engine.metrics.expert_bytes > 0  # in whichever way a step brings them
