"""Two GPUs of one host that attend for their own requests: run with `pytest -m gpu`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import make_prompts, reference, run
from test_gpu_ranks import WIDE, first_logprobs

from hotset.engine.engine import Engine
from hotset.layout import Layout
from hotset.ranks.driver import Ranks

MakeEngine = Callable[..., Engine]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """Two lanes on GPUs, in place of ranks on a CPU."""
    ranks = Ranks(Layout(dp=2, es=2), "cuda", step_timeout_s=120.0)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("tiers", [{}, {"hot_blocks": 26, "host_blocks": 300}])
def test_greedy_tokens_are_those_of_transformers(
    tiers: dict[str, Any], make_ranked: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    prompts = make_prompts(num=12)
    options = {"device": "cuda", "eager": True, "max_num_batched_tokens": 48}
    engine = make_ranked("qwen3_moe", **options, **tiers)
    for lane in engine.lanes:
        lane.scheduler.ahead_tokens = 1  # so that some are preempted
    for _ in range(2):
        assert run(engine, prompts) == reference("qwen3_moe", prompts, device="cuda")
    assert all(lane.kv.pool.num_cached for lane in engine.lanes)


def test_recorded_steps_are_close_to_launched_ones(make_ranked: MakeEngine) -> None:
    wide = {**WIDE, "moe_intermediate_size": 256, "hidden_size": 256}
    options = {"device": "cuda", "model_changes": wide, "model_dtype": torch.bfloat16}
    launched = first_logprobs(
        make_ranked("qwen3_moe", eager=True, kv_bytes=2, **options), closes=True
    )
    engine = make_ranked("qwen3_moe", kv_bytes=2, block_size=16, **options)
    while engine.is_warming:
        engine.warm_up()
    assert first_logprobs(engine) == pytest.approx(launched, abs=0.1)
    assert len(run(engine, make_prompts(num=12))) == 12  # of both lanes at once
