"""An engine over the backend of a GPU, with fakes of kernels: tokens are those of transformers."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from engines import make_prompts, reference, run
from fake_sparse import CpuSparse

from hotset.engine import rank_setup
from hotset.engine.engine import Engine

MakeEngine = Callable[..., Engine]
WIDE = {"kv_lora_rank": 72}  # rows are five times as wide as index keys


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(arena: Any, layers: Any, *, max_context: int, hot: Any, **_: Any) -> CpuSparse:
        return CpuSparse(arena, layers, max_context=max_context, hot=hot)

    monkeypatch.setattr(rank_setup, "choose_backend", choose)


@pytest.mark.parametrize("family", ["glm_moe_dsa", "hy_v4"])
def test_resident_requests_answer_as_transformers_does(
    family: str, make_engine: MakeEngine
) -> None:
    prompts = make_prompts(num=4)
    engine = make_engine(family, hot_blocks=40, host_blocks=100, max_num_batched_tokens=48)
    assert run(engine, prompts, max_tokens=6) == reference(family, prompts, max_tokens=6)


def test_hot_requests_answer_as_transformers_does(make_engine: MakeEngine) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 256) for _ in range(rng.randint(40, 64))] for _ in range(5)]
    engine = make_engine(
        "glm_moe_dsa", hot_blocks=42, host_blocks=200, hot_tokens=16, model_changes=WIDE
    )
    expected = reference("glm_moe_dsa", prompts, max_tokens=24, **WIDE)
    assert run(engine, prompts, max_tokens=24) == expected
    assert engine.metrics.turned_hot > 0
