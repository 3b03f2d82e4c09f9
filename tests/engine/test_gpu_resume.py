"""Answers that move between engines on an NVIDIA GPU: run this there with `pytest -m gpu`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import make_prompts
from test_resume import answers_of, texts_of

from hotset.engine.engine import Engine
from hotset.request import SamplingParams

# Compiling float32 warns that it could be less exact.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 1.0, "seed": 5, "n": 2},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 40},
        {"frequency_penalty": 0.6, "repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("tiers", [{}, {"hot_blocks": 60, "host_blocks": 300}])
def test_an_answer_that_moves_is_the_same(
    changes: dict[str, Any],
    tiers: dict[str, Any],
    make_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    params = SamplingParams(max_tokens=12, ignore_eos=True, **changes)
    prompts = make_prompts(num=4)
    alone = answers_of([make_engine(device="cuda", eager=True)], prompts, params)
    engines = [make_engine(device="cuda", eager=True, **tiers) for _ in range(2)]
    assert texts_of(answers_of(engines, prompts, params, every=2)) == texts_of(alone)
