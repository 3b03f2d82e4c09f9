"""An answer that moves to another engine after each token is the answer of one engine."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from engines import make_prompts, reference
from moved_answers import GREEDY, KINDS, PROMPT, SCHEMA, TOKENIZER, assert_same
from test_hot_requests import answers as reference_of_hot
from test_hot_requests import hot_engine, long_prompts
from tiny_engine import build
from tiny_models import HYBRID_FAMILIES
from tiny_tokenizer import EOS_TOKEN_ID

from hotset.engine.completion import Completion
from hotset.engine.engine import Engine
from hotset.engine.loop import EngineLoop
from hotset.engine.messages import Report, Submit
from hotset.engine.output_text import OutputText
from hotset.engine.run import run_to_end
from hotset.errors import RequestError
from hotset.options import Options
from hotset.request import FinishReason, Resumed, SamplingParams

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    """Engines over the tiny model with a tokenizer, the same each time."""
    made: list[Engine] = []

    def make(*, overlap: bool | None = None, **options: Any) -> Engine:
        sizes = {"hot_gib": 0.002, "block_size": 4}
        made.append(build(Options.of(**sizes | options), overlap=overlap)[0])
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def answers_of(
    engines: Sequence[Engine],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    every: int = 1,
    each_step: Callable[[Engine], None] = lambda _: None,
    **submit: Any,
) -> list[list[Completion]]:
    """What is delivered where the next engine goes on after `every` steps; one goes on alone."""
    answers = [[Completion(index=i) for i in range(params.n)] for _ in prompts]
    for number, engine in enumerate(cycle(engines)):
        owners: dict[str, list[Completion]] = {}
        for prompt, answer in zip(prompts, answers, strict=True):
            left = [one for one in answer if one.finish_reason is None]
            resumed = [Resumed(one.index, tuple(one.token_ids)) for one in left if number]
            if left:
                request_id = engine.add_request(prompt, params, resumed=resumed, **submit)
                owners[request_id] = answer
        if not owners:
            return answers
        num_moments = 0
        while engine.has_work and (len(engines) == 1 or num_moments < every):
            outputs = engine.step()
            for output in outputs:
                assert output.error is None, output.error
                owners[output.request_id][output.index].add(output)
            num_moments += len(outputs) > 0
            each_step(engine)
        leave(engine, owners)
    raise AssertionError


def leave(engine: Engine, request_ids: Iterable[str]) -> None:
    """End what is left of requests as moved; nothing of it stays."""
    for request_id in request_ids:
        engine.abort(request_id, FinishReason.MOVED)
    while engine.has_work or engine.has_transfers:
        for output in engine.step():
            assert output.finish_reason is FinishReason.MOVED
            assert not output.text and not output.token_ids
    engine.kv.check()
    assert engine.kv.pool.num_held == 0
    sampler = engine.executor.sampler  # type: ignore[attr-defined]
    assert not sampler._generators and not sampler._matchers and not sampler._changes._counts


def texts_of(answers: Iterable[Iterable[Completion]]) -> list[list[tuple[list[int], str]]]:
    return [[(one.token_ids, one.text) for one in answer] for answer in answers]


def stop_strings(text: str) -> tuple[str, ...]:
    """One that comes too soon, one that the text comes close to, and one that ends it."""
    middle = len(text) // 2
    return (text[:2], text[middle - 6 : middle - 2] + "\x00", text[middle : middle + 3])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_moves_after_each_token_is_the_same(
    kind: str, overlap: bool, make: MakeEngine
) -> None:
    params = KINDS[kind]
    [alone] = answers_of([make()], [PROMPT], params)
    engines = [make(overlap=overlap) for _ in range(2)]
    [moved] = answers_of(engines, [PROMPT], params)
    assert_same(moved, alone)
    assert max(len(one.token_ids) for one in alone) > 8
    assert engines[0].metrics.prompt_tokens == len(PROMPT) and not engines[1].metrics.prompt_tokens


@pytest.mark.parametrize("is_included", [False, True])
def test_text_that_is_held_back_comes_from_where_the_answer_goes_on(
    is_included: bool, make: MakeEngine
) -> None:
    [[whole]] = answers_of([make()], [PROMPT], GREEDY)
    stop = stop_strings(whole.text)
    params = replace(
        GREEDY, stop=stop, min_tokens=3, include_stop_str_in_output=is_included, logprobs=0
    )
    [alone] = answers_of([make()], [PROMPT], params)
    assert alone[0].finish_reason == "stop" and len(alone[0].token_ids) > 4
    [moved] = answers_of([make(), make()], [PROMPT], params)
    assert_same(moved, alone)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_caching": False},
        {"max_num_batched_tokens": 4},
        {"hot_gib": 0.0002, "host_gib": 0.01, "fetch_policy": "fetch"},
        {"hot_gib": 0.0002, "host_gib": 0.0001, "disk_gib": 0.01, "fetch_policy": "fetch"},
    ],
)
def test_how_an_engine_computes_what_it_takes_over_does_not_matter(
    options: dict[str, Any], make: MakeEngine, tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) if "disk_gib" in options else None for name in "ab"]
    engines = [make(**options, disk_path=path) for path in paths]
    for params in (replace(KINDS["seeded"], n=3), KINDS["penalties"]):
        alone = answers_of([make()], [PROMPT, PROMPT[:8]], params)
        moved = answers_of(engines, [PROMPT, PROMPT[:8]], params)
        assert texts_of(moved) == texts_of(alone)
    metrics = engines[0].metrics
    assert metrics.resumed_tokens.total() + metrics.recomputed_tokens > 100
    assert (metrics.fetched_blocks > 0) == ("host_gib" in options)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_an_answer_of_a_model_with_states_moves(family: str, make_engine: MakeEngine) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 24, "host_blocks": 60}
    engines = [make_engine(family, **options) for _ in range(2)]
    answers = answers_of(engines, make_prompts(num=4), replace(GREEDY, max_tokens=12), every=3)
    assert [one.token_ids for [one] in answers] == reference(family, make_prompts(num=4))
    assert engines[0].kv.states is not None
    assert engines[0].kv.states.slots.pool.num_held == 0


def test_hot_requests_move(make_engine: MakeEngine) -> None:
    def turn_all(engine: Engine) -> None:
        for request in engine.scheduler.running:
            assert engine.kv.hot is not None
            engine.kv.hot.turn_hot(request)

    prompts = long_prompts(3)
    engines = [hot_engine(make_engine) for _ in range(2)]
    moved = answers_of(engines, prompts, GREEDY, every=5, each_step=turn_all)
    assert [one.token_ids for [one] in moved] == reference_of_hot("deepseek_v32", prompts)
    assert all(engine.metrics.turned_hot > 2 for engine in engines)


def test_outputs_of_which_nothing_was_delivered_begin_and_ended_ones_do_not_come_again(
    make: MakeEngine,
) -> None:
    engine, params = make(), replace(KINDS["logprobs"], n=3)
    [alone] = answers_of([engine], [PROMPT], params)
    tokens = tuple(alone[2].token_ids[:7])
    engine = make()
    request_id = engine.add_request(PROMPT, params, resumed=[Resumed(2, tokens), Resumed(1)])
    completions = [Completion(index=i) for i in range(3)]
    completions[2].token_ids += tokens
    for output in run_to_end(engine):
        assert output.request_id == request_id
        completions[output.index].add(output)
    assert completions[0] == Completion()
    for index in (1, 2):
        assert completions[index].token_ids == alone[index].token_ids
        assert not completions[index].prompt_logprobs  # an output was delivered, and they with it
        assert not completions[index].cached_tokens
    assert alone[2].text.endswith(completions[2].text)


def test_an_output_that_is_resumed_goes_before_those_that_have_not_begun(make: MakeEngine) -> None:
    engine = make(max_num_seqs=1)
    names = [engine.add_request(PROMPT, GREEDY) for _ in range(2)]
    names.append(engine.add_request(PROMPT, GREEDY, resumed=[Resumed(0, (9, 8))]))
    assert [one.request_id for one in engine.scheduler.waiting] == [names[2], names[0], names[1]]


@pytest.mark.parametrize(
    ("changes", "resumed", "reason"),
    [
        ({"n": 2}, [Resumed(2)], r"outputs \[2\] are to go on; expected each of 0 to 1 once"),
        ({"n": 2}, [Resumed(1), Resumed(1)], r"outputs \[1, 1\] are to go on"),
        ({}, [Resumed(0, (512,))], r"a token id of output 0 is not in \[0, 512\)"),
        ({}, [Resumed(0, (9,) * 24)], "cannot go on from its 24 tokens: max_tokens is 24"),
        ({"max_tokens": 0}, [Resumed(0, (9,))], "its 1 tokens: max_tokens is 0"),
        ({"max_tokens": None}, [Resumed(0, (9,) * 500)], "as long as the longest context"),
        ({"ignore_eos": False}, [Resumed(0, (9, EOS_TOKEN_ID, 9))], "it ends with token 2 of them"),
        ({"stop_token_ids": (9,)}, [Resumed(0, (8, 9))], "it ends with token 2 of them"),
        ({"stop": ("cat",)}, [Resumed(0, tuple(TOKENIZER.encode("the cat").ids))], "it ends with"),
        (
            {"json_schema": SCHEMA, "ignore_eos": False},
            [Resumed(0, tuple(TOKENIZER.encode("{dog").ids))],
            "an output cannot go on from its .* tokens: json_schema cannot go on",
        ),
    ],
)
def test_tokens_that_no_output_can_go_on_from_are_refused(
    changes: dict[str, Any], resumed: list[Resumed], reason: str, make: MakeEngine
) -> None:
    engine = make()
    with pytest.raises(RequestError, match=reason):
        engine.add_request(PROMPT, replace(GREEDY, **changes), resumed=resumed)
    assert not engine.has_work


def test_tokens_of_an_answer_so_far_are_decoded_once_and_not_beside_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fed: list[tuple[int, str]] = []
    append = OutputText.append

    def note(self: OutputText, token_id: int) -> int:
        fed.append((token_id, threading.current_thread().name))
        return append(self, token_id)

    monkeypatch.setattr(OutputText, "append", note)
    done = threading.Event()

    def take(report: Report) -> None:
        if any(output.finish_reason is not None for output in report.outputs):
            done.set()

    loop = EngineLoop(Options.of(hot_gib=0.002, block_size=4), build, take)
    try:
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        loop.submit(Submit("a", PROMPT, params, resumed=[Resumed(0, (30, 31, 32))]))
        assert done.wait(60)
    finally:
        loop.close()
    here = threading.current_thread().name
    assert fed[:3] == [(30, here), (31, here), (32, here)]
    assert [name for _, name in fed[3:]] == ["hotset-engine"] * 6
