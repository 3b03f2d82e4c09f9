"""A step is a message: a copy of it that was sent computes the same."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engines import make_prompts

from hotset.engine.engine import Engine
from hotset.engine.step import StepItem
from hotset.executor.step_input import StepInput
from hotset.request import RequestOutput, SamplingParams
from hotset.sequence import Kind, Request

MakeEngine = Callable[..., Engine]
PARAMS = [
    SamplingParams(max_tokens=8, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=2, ignore_eos=True),
    SamplingParams(max_tokens=8, repetition_penalty=1.5, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=4, prompt_logprobs=2, min_tokens=2),
]


def answers(engine: Engine) -> list[RequestOutput]:
    for prompt, params in zip(make_prompts(num=8), PARAMS * 2, strict=True):
        engine.add_request(prompt, params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_a_step_that_was_pickled_computes_what_the_step_does(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(make_engine(overlap=True, max_num_batched_tokens=32))
    engine = make_engine(overlap=True, max_num_batched_tokens=32)
    submit = engine.executor.submit
    kinds = set()

    def send(steps: Sequence[StepInput], when_ready: Callable[[], None]) -> Any:
        [step] = steps
        message = pickle.dumps(step)
        assert b"hotset.sequence Request" not in message and b"KVCache" not in message
        kinds.update(step.kinds)
        return submit([pickle.loads(message)], when_ready)

    monkeypatch.setattr(engine.executor, "submit", send)
    assert answers(engine) == expected
    assert kinds == {Kind.DECODE, Kind.PROMPT}


def test_one_token_is_a_decode_and_several_are_a_prompt() -> None:
    request = Request("r", 3, [5, 6, 7], SamplingParams(), 9)
    assert request.kind is Kind.PROMPT
    assert StepItem.of(request, 0, 3).kind is StepItem.of(request, 0, 2).kind is Kind.PROMPT
    assert StepItem.of(request, 2, 1).kind is Kind.DECODE
    request.kv.num_computed_tokens = 2
    assert request.kind is Kind.DECODE


def test_drafts_are_refused_by_name(make_engine: MakeEngine) -> None:
    from hotset.engine.step import Step
    from hotset.engine.step_input import make_step_input

    engine = make_engine()
    request = Request("r", 3, [5, 6, 7], SamplingParams(), 9)
    request.kv.block_table = [0]
    step = make_step_input(Step([StepItem(request, 0, 3, Kind.VERIFY)]), 4)
    with pytest.raises(NotImplementedError, match="VERIFY"):
        engine.executor.submit([step], lambda: None)
