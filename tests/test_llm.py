"""LLM, the front door from Python: what it takes, and how its completions end."""

import asyncio
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from forks import in_a_fork
from servers import build, wait_for

import hotset.llm
from hotset.engine.engine import Engine
from hotset.engine.service import EngineService
from hotset.errors import ConfigError, EngineError, RequestError
from hotset.llm import LLM
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
CHAT = [{"role": "user", "content": "the cat"}]


def make_llm(monkeypatch: pytest.MonkeyPatch, **options: Any) -> LLM:
    service = functools.partial(EngineService, build=build, **options)
    monkeypatch.setattr(hotset.llm, "EngineService", service)
    return LLM(hot_gib=0.01)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        made = make_llm(patch)
    yield made
    made.close()


@pytest.fixture
def own_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """One that the test may close."""
    made = make_llm(monkeypatch)
    yield made
    made.close()


def test_token_ids_are_taken_as_they_are(llm: LLM) -> None:
    ids = llm._encoder.encode_text("the cat")
    [of_text] = llm.generate("the cat", SHORT)
    for prompt in (ids, tuple(ids), list(np.array(ids))):
        [of_ids] = llm.generate(prompt, SHORT)
        assert of_ids.token_ids == of_text.token_ids
        assert of_ids.prompt_tokens == len(ids)
    assert "".join(llm.stream(ids, SHORT)) == of_text.text

    async def read() -> str:
        return "".join([piece async for piece in llm.astream(ids, SHORT)])

    assert asyncio.run(read()) == of_text.text


def test_texts_chats_and_token_ids_may_be_mixed(llm: LLM) -> None:
    ids = llm._encoder.encode_text("the cat")
    mixed = llm.generate(["the cat", ids, CHAT], SHORT)
    assert mixed[0].token_ids == mixed[1].token_ids
    assert mixed[2].token_ids == llm.generate(CHAT, SHORT)[0].token_ids
    assert llm.generate([ids, ids[:1]], SHORT)[0].token_ids == mixed[0].token_ids
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (None, "prompts is None; expected a text, a chat"),
        (b"the cat", "prompts is of type bytes"),
        (bytearray(b"the cat"), "prompts is of type bytearray"),
        (5, "prompts is of type int"),
        (CHAT[0], "prompts is of type dict"),
        ({1, 2}, "prompts is of type set"),
        (iter(["a"]), "prompts is of type list_iterator"),
        (np.array([1, 2]), "prompts is of type ndarray"),
        ([1.5], "the prompt is of type float"),
        ([True, False], "prompt 0: the prompt is of type bool"),
        ([1, "a"], "prompt 0: the prompt is of type int"),
        (["a", None], "prompt 1: the prompt is None"),
        (["a", b"b"], "prompt 1: the prompt is of type bytes"),
        ([[1, 2], ["a"]], "prompt 1: the prompt is a list of str"),
        ([[[1, 2]]], "the prompt is a list of list"),
        ([[CHAT[0], "a"]], "the prompt is a list of dict and str"),
    ],
)
def test_prompts_of_another_type_are_refused_by_name(llm: LLM, prompts: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llm.generate(prompts, SHORT)
    assert str(caught.value).startswith(says) and "expected a text" in str(caught.value)
    wait_for(lambda: llm.service.num_open == 0)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([[]], "the prompt is empty"),
        ([CHAT, []], "prompt 1: the prompt is empty"),
        ([{"content": "the cat"}], "message 0 has no role"),
        ([[1, 2], [10**9]], "prompt 1: "),
        ([-1], "token"),
        ([2**70], "token"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused(llm: LLM, prompts: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        llm.generate(prompts, SHORT)
    wait_for(lambda: llm.service.num_open == 0)


@pytest.mark.parametrize("prompt", [None, 5, b"a", ["a", "b"], [1.5]])
def test_a_stream_takes_one_prompt(llm: LLM, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="expected a text"):
        list(llm.stream(prompt, SHORT))

    async def read() -> list[str]:
        return [piece async for piece in llm.astream(prompt, SHORT)]

    with pytest.raises(ConfigError, match="expected a text"):
        asyncio.run(read())


@pytest.mark.parametrize("params", [{"max_tokens": 3}, 3, "x", [None], [SHORT, {}]])
def test_params_of_another_type_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(ConfigError, match=r"params is .*; expected a SamplingParams"):
        llm.generate(["a", "b"], params)
    with pytest.raises(ConfigError, match=r"params is .*; expected a SamplingParams"):
        list(llm.stream("a", params))
    with pytest.raises(RequestError, match="1 params for 2 prompts"):
        llm.generate(["a", "b"], [SHORT])


def test_a_stream_that_a_close_cuts_raises(own_llm: LLM) -> None:
    pieces = own_llm.stream("the cat", LONG)
    next(pieces)
    own_llm.close()
    with pytest.raises(EngineError, match="the engine was closed before"):
        list(pieces)


def test_an_async_stream_that_a_close_cuts_raises(own_llm: LLM) -> None:
    async def read() -> None:
        pieces = own_llm.astream("the cat", LONG)
        await anext(pieces)
        await asyncio.to_thread(own_llm.close)
        with pytest.raises(EngineError, match="the engine was closed before"):
            async for _ in pieces:
                pass

    asyncio.run(read())


def test_completions_that_a_close_cuts_raise(own_llm: LLM) -> None:
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            own_llm.generate(["the cat", "a dog"], [LONG, SHORT])
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: own_llm.service.metrics.output_tokens > 3)
    own_llm.close()
    thread.join()
    [error] = caught
    assert isinstance(error, EngineError) and "closed" in str(error)


def test_an_abort_that_the_reader_asked_for_is_no_error(llm: LLM) -> None:
    stream = llm.service.submit([5, 6], LONG)
    outputs = iter(stream)
    next(outputs)
    stream.abort()
    *_, last = outputs
    assert last.finish_reason is not None and last.finish_reason.value == "abort"
    assert last.error is None and stream.is_aborted


def test_a_task_cancelled_while_its_prompt_is_encoded_leaves_nothing(llm: LLM) -> None:
    encode, is_encoding = llm._encoder.encode_text, threading.Event()

    def slowly(text: str) -> list[int]:
        is_encoding.set()
        time.sleep(0.1)
        return encode(text)

    async def main() -> None:
        task = asyncio.ensure_future(anext(llm.astream("the cat", LONG)))
        await asyncio.to_thread(is_encoding.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.15)

    before = llm.service.metrics.output_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._encoder, "encode_text", slowly)
        asyncio.run(main())
    wait_for(lambda: llm.service.num_open == 0)
    assert llm.service.metrics.output_tokens < before + 400


async def first(llm: LLM) -> str:
    return await anext(llm.astream("the cat", SHORT))


def test_in_a_fork_every_call_says_that_the_engine_is_elsewhere(llm: LLM) -> None:
    open_stream = llm.service.submit([5, 6], LONG)
    next(iter_of_open := iter(open_stream))
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate(["the cat"], SHORT),
        lambda: next(llm.stream("the cat", SHORT)),
        lambda: asyncio.run(first(llm)),
        lambda: llm.service.submit([5], SHORT),
        lambda: llm.service.status(),
        lambda: list(iter_of_open),
        lambda: list(llm.service.submit([5], SHORT)),
    ]
    for call in calls:
        answer = in_a_fork(call)
        assert answer.startswith(f"EngineError: the engine is in process {os.getpid()}"), answer
        assert "\n" not in answer
    open_stream.abort()


def test_closing_and_aborting_in_a_fork_do_nothing(llm: LLM) -> None:
    stream = llm.service.submit([5, 6], LONG)
    outputs = iter(stream)
    next(outputs)
    with llm.service._lock, stream._condition:  # as another thread may hold them
        assert in_a_fork(llm.close) == "returned"
        assert in_a_fork(stream.abort) == "returned"
        assert in_a_fork(outputs.close) == "returned"  # type: ignore[attr-defined]
    *_, last = outputs
    assert last.finish_reason is not None and last.finish_reason.value == "length"


@pytest.mark.parametrize("kind", [SystemExit, MemoryError])
def test_whatever_ends_the_engines_thread_ends_the_streams(kind: type[BaseException]) -> None:
    def build_failing(config: Options) -> tuple[Engine, LoadedModel]:
        engine, loaded = build(config)

        def fail(*, num_queued: int = 0) -> None:
            raise kind(3)  # made here: its traceback refers to the engine

        engine.step = fail  # type: ignore[method-assign, assignment]
        return engine, loaded

    service = EngineService(Options.of(hot_gib=0.01), build=build_failing)
    [output] = service.submit([5, 6], LONG)
    assert output.error is not None and kind.__name__ in output.error
    service.close()


def test_readers_of_an_engine_that_is_gone_without_a_word_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hotset.engine.output_stream._LOOK_EVERY_S", 0.05)
    service = EngineService(Options.of(hot_gib=0.01), build=build)
    streams = [service.submit([5, 6], SHORT) for _ in range(2)]
    for stream in streams:
        list(stream)
    gone = [service._streams.setdefault(s.request_id, s) for s in streams]
    for stream in gone:  # as if no last output had come
        stream._unfinished.add(0)
    service._host.close()

    async def read() -> list[str | None]:
        return [output.error async for output in gone[0]]

    assert asyncio.run(read()) == ["the engine has ended without a word"]
    assert not service.healthy
    with pytest.raises(EngineError, match="without a word"):
        service.submit([5], SHORT)
    service.close()
