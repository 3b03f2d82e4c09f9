"""Sparse attention: the same tokens as transformers', whatever the steps.

Over tiers, preemptions, a restart, blocks and chunks of any size: `test_latent_equality`.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import make_prompts, reference, run
from tiny_models import SPARSE_FAMILIES

from hotset.attention.sparse import gathered
from hotset.engine.engine import Engine
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
TIED = {"index_n_heads": 2}  # about a quarter of all scores are exactly 0


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


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@pytest.mark.parametrize(("chunk", "block_size"), [(512, 16), (7, 3)])
def test_of_equal_scores_the_lowest_positions_are_selected_whatever_the_steps(
    family: str, chunk: int, block_size: int, make_engine: MakeEngine
) -> None:
    prompts = make_prompts(num=3)
    engine = make_engine(
        family, model_changes=TIED, max_num_batched_tokens=chunk, block_size=block_size
    )
    answers = run(engine, prompts)
    assert answers == reference(family, prompts, **TIED)
    assert answers != reference(family, prompts, ties="any", **TIED)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_contexts_may_end_anywhere_around_a_block_and_what_is_selected(
    family: str, make_engine: MakeEngine
) -> None:
    """16 are selected and a block has 8; memory is as if others had written to it."""
    rng = random.Random(0)
    lengths = (7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33)
    prompts = [[rng.randrange(3, 256) for _ in range(length)] for length in lengths]
    engine = make_engine(
        family, model_changes=TIED, block_size=8, hot_blocks=14, max_num_batched_tokens=17
    )
    engine.executor.runner._arena.memory.view(torch.float32).fill_(1e3)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1 and engine.metrics.steps % 5 == 0:
            engine.scheduler._preempt_last()

    assert run(engine, prompts, each_step=preempt_one) == reference(family, prompts, **TIED)
    assert engine.metrics.preemptions > 0
