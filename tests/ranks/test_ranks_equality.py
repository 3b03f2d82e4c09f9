"""Two ranks answer what one does, token for token, whatever the tiers, chunks and preemptions."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import make_prompts, reference, run

from hotset.engine.engine import Engine
from hotset.metrics import Metrics
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
RunOne = Callable[..., tuple[list[list[int]], Metrics]]

STARVED = {"hot_blocks": 26, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return reference("llama", make_prompts())


@pytest.mark.parametrize(
    "family",
    [
        "llama-mha",
        "llama-mqa",
        "mistral",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "mixtral",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "gpt_oss",
        "deepseek_v2",
        "deepseek_v3",
        "minicpm3",
    ],
)
def test_each_architecture_answers_as_transformers_does(
    family: str, make_ranked: MakeEngine
) -> None:
    prompts = make_prompts()
    engine = make_ranked(family, hot_blocks=60, host_blocks=100, max_num_batched_tokens=24)
    assert run(engine, prompts) == reference(family, prompts)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        {"overlap": True},
        {**STARVED, "overlap": True},
        {**STARVED, "host_blocks": 300, "fetch_policy": "fetch", "overlap": True},
        {**STARVED, "host_blocks": 5, "disk_mib": 16, "fetch_policy": "fetch"},
        {"model_changes": {"vocab_size": 257}},
        {"model_changes": {"tie_word_embeddings": True}},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_sizes_and_tiers_do_not_matter(
    changes: dict[str, Any],
    make_ranked: MakeEngine,
    tmp_path: Path,
    expected: list[list[int]],
) -> None:
    disk = {"disk_path": tmp_path} if "disk_mib" in changes else {}
    engine = make_ranked(**changes, **disk)
    engine.scheduler.ahead_tokens = 1  # so that some are preempted
    prompts = make_prompts()
    of_model = changes.get("model_changes")
    wanted = expected if of_model is None else reference("llama", prompts, **of_model)
    for _ in range(3):  # later rounds find prefixes in all tiers
        assert run(engine, prompts) == wanted
    if "hot_blocks" in changes:
        assert engine.metrics.preemptions > 0
    assert engine.metrics.cached_tokens["device"] > 0


def test_a_preemption_before_every_step_does_not_matter(
    make_ranked: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_ranked(host_blocks=300, max_num_batched_tokens=48)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1:
            engine.scheduler._preempt_last()

    assert run(engine, make_prompts(), each_step=preempt_one) == expected
    assert engine.metrics.preemptions > 10


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
    wanted, _ = run_one(params=params)
    assert run(make_ranked(overlap=True), make_prompts(), **params) == wanted


@pytest.mark.many
def test_requests_that_come_and_go_leave_nothing(make_ranked: MakeEngine) -> None:
    engine = make_ranked(hot_blocks=26, host_blocks=60, max_num_batched_tokens=32, overlap=True)
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
        engine.kv.check()
    while engine.has_work or engine.has_transfers:
        engine.step()
    assert engine.metrics.requests_finished.total() > 20
    assert engine.kv.pool.num_held == 0


def test_a_restart_of_as_many_ranks_answers_from_disk(
    make_ranked: MakeEngine, run_one: RunOne, tmp_path: Path, expected: list[list[int]]
) -> None:
    options = {"disk_mib": 16, "disk_path": tmp_path, "fetch_policy": "fetch"}
    first = make_ranked(**options)
    run(first, make_prompts())
    while first.has_transfers:
        first.step()
    first.close()

    second = make_ranked(**options)
    assert run(second, make_prompts()) == expected
    assert second.metrics.cached_tokens["disk"] > 50
    second.close()

    answers, metrics = run_one(**options)
    assert answers == expected
    assert metrics.cached_tokens["disk"] == 0


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
