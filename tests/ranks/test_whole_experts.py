"""Ranks that have whole experts answer what one does, whether or not they attend together."""

from collections.abc import Callable

import pytest
from engines import make_prompts, reference, run

from hotset.engine.engine import Engine
from hotset.experts.weights import experts_layers
from hotset.layout import Layout
from hotset.metrics import Metrics

MakeEngine = Callable[..., Engine]
RunOne = Callable[..., tuple[list[list[int]], Metrics]]


@pytest.fixture(scope="module", params=[Layout(tp=2, ep=2), Layout(dp=2, ep=2)], ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_each_architecture_answers_as_transformers_does(
    family: str, make_ranked: MakeEngine
) -> None:
    prompts = make_prompts()
    engine = make_ranked(family, hot_blocks=60, host_blocks=100, max_num_batched_tokens=40)
    for _ in range(2):
        assert run(engine, prompts) == reference(family, prompts)
    layers = experts_layers(engine.executor.local.runner._model)  # type: ignore[attr-defined]
    assert all(2 * each.num_experts == len(each.shard.local_ids._slots) for each in layers)


def test_chunks_and_preemptions_do_not_matter(make_ranked: MakeEngine) -> None:
    prompts = make_prompts(num=12)
    engine = make_ranked(
        "qwen3_moe", hot_blocks=26, host_blocks=300, max_num_batched_tokens=32, overlap=True
    )
    for lane in engine.lanes:
        lane.scheduler.ahead_tokens = 1
    for _ in range(2):
        assert run(engine, prompts) == reference("qwen3_moe", prompts)
    assert engine.metrics.preemptions > 0


def test_a_middle_that_cannot_be_cut_needs_whole_experts(
    make_ranked: MakeEngine, run_one: RunOne
) -> None:
    changes = {"model_changes": {"moe_intermediate_size": 33}}
    wanted, _ = run_one("qwen3_moe", **changes)
    assert run(make_ranked("qwen3_moe", **changes), make_prompts()) == wanted
