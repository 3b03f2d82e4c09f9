"""Requests whose answers move between engines, and what stays the same."""

from dataclasses import replace
from typing import Any

import pytest
from tiny_tokenizer import make_backend

from hotset.engine.completion import Completion
from hotset.request import SamplingParams, TextForm, TokenLogprob

TOKENIZER = make_backend()
PROMPT = TOKENIZER.encode("The cat sat on the mat, and the dog sat by").ids
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "tags": {"type": "array"}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 7}
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(max_tokens=24, ignore_eos=True, top_p=0.95, top_k=200, **SEEDED),
    "several": SamplingParams(
        max_tokens=24, n=4, stop_token_ids=tuple(range(3, 60)), **SEEDED
    ),  # which end one after the other
    "schema": SamplingParams(max_tokens=60, json_schema=SCHEMA, n=2, **SEEDED),
    "call": SamplingParams(
        max_tokens=60,
        text_form=TextForm("grammar", 'start: "<call>" /[a-z]{2,9}/ "</call>"'),
        **SEEDED,
    ),
    "penalties": SamplingParams(
        max_tokens=24,
        ignore_eos=True,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        logit_bias={9: 4.0},
    ),
    "logprobs": SamplingParams(max_tokens=24, logprobs=3, prompt_logprobs=2, n=2, **SEEDED),
    "min_tokens": SamplingParams(
        max_tokens=24, min_tokens=9, stop_token_ids=tuple(range(3, 400)), **SEEDED
    ),
}


def assert_same(moved: list[Completion], alone: list[Completion]) -> None:
    """But for rounding: a token's logits come of a step of one token, or of several."""
    for one, other in zip(moved, alone, strict=True):
        for name in ("logprobs", "prompt_logprobs"):
            assert_close(getattr(one, name), getattr(other, name))
        assert replace(one, logprobs=[], prompt_logprobs=[]) == replace(
            other, logprobs=[], prompt_logprobs=[]
        )


def assert_close(some: list[TokenLogprob], others: list[TokenLogprob]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one._replace(logprob=0, top=()) == other._replace(logprob=0, top=())
        numbers = [one.logprob, *(number for _, number in one.top)]
        assert numbers == pytest.approx(
            [other.logprob, *(number for _, number in other.top)], abs=1e-4
        )
        assert [i for i, _ in one.top] == [i for i, _ in other.top]
