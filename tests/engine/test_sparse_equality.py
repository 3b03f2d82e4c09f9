"""Sparse attention: the same tokens as transformers', whatever the steps.

Over tiers, preemptions, a restart, blocks and chunks of any size: `test_latent_equality`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import make_prompts, reference, run

from hotset.attention.sparse import gathered
from hotset.engine.engine import Engine
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize("overlap", [False, True])
def test_several_answers_of_a_prompt_share_its_index_keys_until_they_write(
    overlap: bool, make_engine: MakeEngine
) -> None:
    prompts = make_prompts(num=1)
    engine = make_engine("deepseek_v32", overlap=overlap)
    engine.add_request(prompts[0], SamplingParams(max_tokens=12, ignore_eos=True, n=3))
    answers: list[list[int]] = [[], [], []]
    while engine.has_work:
        for output in engine.step():
            answers[output.index] += output.token_ids
    assert answers == reference("deepseek_v32", prompts) * 3


def test_intermediate_results_in_pieces_do_not_matter(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered, "_MOST_VALUES", 2000)
    prompts = make_prompts(num=2)
    assert run(make_engine("hy_v4"), prompts) == reference("hy_v4", prompts)


def test_contexts_of_no_more_than_is_selected_are_not_scored(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("scored")

    short = [prompt[:4] for prompt in make_prompts()]
    engine = make_engine("deepseek_v32")
    monkeypatch.setattr(gathered, "score_keys", refuse)
    assert run(engine, short) == reference("deepseek_v32", short)
    with pytest.raises(AssertionError, match="scored"):
        run(engine, make_prompts())


def test_what_is_selected_decides_tokens_here() -> None:
    """Else the equality of the tests above would say nothing about selections."""
    prompts = make_prompts()
    assert reference("deepseek_v32", prompts) != reference("deepseek_v32", prompts, index_topk=96)
