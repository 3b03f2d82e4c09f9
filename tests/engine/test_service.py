import asyncio
import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import build, build_for_long

from hotset.engine.completion import gather
from hotset.engine.engine import Engine
from hotset.engine.messages import Report
from hotset.engine.process import _child
from hotset.engine.service import EngineService
from hotset.errors import ConfigError, EngineError, RequestError
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


def make_service() -> EngineService:
    return EngineService(Options.of(hot_gib=0.01), build=build)


@pytest.fixture
def service() -> Iterator[EngineService]:
    service = make_service()
    yield service
    service.close()


def wait_for(condition: Any, *, most_s: float = 10.0) -> None:
    for _ in range(int(most_s / 0.005)):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def test_a_short_prompt_passes_long_ones_that_wait_for_memory() -> None:
    config = Options.of(hot_gib=0.00042, max_model_len=512, max_num_batched_tokens=64)
    service = EngineService(config, build=build)
    try:
        num_blocks = service.status().result(60).tiers[0].capacity
        assert 34 <= num_blocks <= 40  # of 16 tokens
        running = service.submit([7] * 100, SamplingParams(max_tokens=400, ignore_eos=True))
        one = SamplingParams(max_tokens=1, ignore_eos=True)
        # More than the loop hands to the engine: a short one waits behind them there too.
        long = [service.submit([8 + i] * 200, one) for i in range(20)]
        [short] = gather(service.submit([5, 6], SamplingParams(max_tokens=2, ignore_eos=True)), 1)
        assert len(short.token_ids) == 2
        assert service.metrics.requests_finished.total() == 1
        running.abort()
        assert all(gather(stream, 1)[0].finish_reason == "length" for stream in long)
    finally:
        service.close()


def test_requests_from_many_threads_all_end(service: EngineService) -> None:
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        got[i] = gather(service.submit([10 + i, 11], params), 1)[0].token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(ids) for ids in got.values()} == {5}
    assert len(got) == 8


def test_a_request_that_cannot_be_served_raises_where_it_is_submitted(
    service: EngineService,
) -> None:
    with pytest.raises(RequestError, match="empty"):
        service.submit([], SamplingParams())
    with pytest.raises(RequestError, match="longest context"):
        service.submit([5] * 600, SamplingParams())


def test_leaving_a_loop_early_aborts_the_request(service: EngineService) -> None:
    for _ in service.submit([5, 6], LONG):
        break
    wait_for(lambda: service.metrics.requests_finished["abort"] == 1)


def test_a_cancelled_task_aborts_its_request(service: EngineService) -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in service.submit([5, 6], LONG):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_for(lambda: service.metrics.requests_finished["abort"] == 1)


def test_close_ends_open_streams_and_may_be_repeated(service: EngineService) -> None:
    stream = service.submit([5, 6], LONG)
    service.close()
    service.close()

    [completion] = gather(stream, 1)
    assert completion.finish_reason == "abort"
    with pytest.raises(EngineError, match="closed"):
        service.submit([5], SamplingParams())


def test_an_engine_that_fails_ends_every_stream_with_the_reason() -> None:
    def build_failing(config: Options) -> tuple[Engine, LoadedModel]:
        engine, loaded = build(config)

        def fail(*, num_queued: int = 0) -> None:
            raise ValueError("broken\nstep")

        engine.step = fail  # type: ignore[method-assign, assignment]
        return engine, loaded

    service = EngineService(Options.of(hot_gib=0.01), build=build_failing)
    [completion] = gather(service.submit([5, 6], LONG), 1)
    assert completion.finish_reason == "error"
    assert completion.error == "the engine has failed: ValueError: broken step"
    assert not service.healthy
    with pytest.raises(EngineError, match="broken"):
        service.submit([5], SamplingParams())
    service.close()


def test_an_engine_that_cannot_be_built_raises_in_the_constructor() -> None:
    def refuse(config: Options) -> tuple[Engine, LoadedModel]:
        raise ConfigError("too small")

    with pytest.raises(ConfigError, match="too small"):
        EngineService(Options.of(), build=refuse)


def test_ctrl_c_ends_an_engine_that_starts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"
    config = Options.of(model=str(begun))

    def interrupt(connection: Connection) -> None:
        wait_for(begun.exists, most_s=60)
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "recv", interrupt)
    with pytest.raises(KeyboardInterrupt):
        EngineService(config, build=build_for_long, own_process=True)
    [child] = (one for one in multiprocessing.active_children() if one.name == "hotset-engine")
    child.join(30)
    assert child.exitcode == -signal.SIGKILL


def test_an_engine_that_starts_ends_with_the_process_that_wants_it(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, Options.of(model=str(begun)), build_for_long)
    child = context.Process(target=_child, args=arguments, daemon=True)
    child.start()
    try:
        theirs.close()
        wait_for(begun.exists, most_s=60)
        ours.close()
        child.join(30)
        assert child.exitcode == 1
    finally:
        child.kill()


class WarmingEngine(Engine):
    """One whose start left three pieces of work out, the second of which has to wait a while."""

    num_pieces = 3
    num_waits = 2

    @property
    def is_warming(self) -> bool:
        return self.num_pieces > 0

    def warm_up(self) -> tuple[bool, str | None]:
        if self.num_pieces == 2 and self.num_waits > 0:
            self.num_waits -= 1
            return False, None
        self.num_pieces -= 1
        return True, "warm now" if self.num_pieces == 0 else None


def test_an_engine_serves_while_it_warms_up_and_tells_when_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made: list[WarmingEngine] = []

    def build_warming(config: Options) -> tuple[Engine, LoadedModel]:
        engine, loaded = build(config)
        engine.__class__ = WarmingEngine
        made.append(engine)
        return made[0], loaded

    caplog.set_level("INFO", "hotset")
    service = EngineService(Options.of(hot_gib=0.01), build=build_warming)
    try:
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        assert len(gather(service.submit([5, 6], params), 1)[0].token_ids) == 3
        wait_for(lambda: "warm now" in caplog.messages)
        assert made[0].num_pieces == 0 and made[0].num_waits == 0
        assert len(gather(service.submit([5, 6], params), 1)[0].token_ids) == 3
    finally:
        service.close()


def test_all_of_n_outputs_have_the_log_probabilities_of_their_prompt(
    service: EngineService,
) -> None:
    ids = [5, 6, 7, 8]
    params = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=2, logprobs=1, n=3)
    completions = gather(service.submit(ids, params), 3)
    for completion in completions:
        assert [entry.token_id for entry in completion.prompt_logprobs] == ids[1:]
        assert all(len(entry.top) == 2 and entry.rank for entry in completion.prompt_logprobs)


def test_reports_between_processes_keep_all_of_an_output() -> None:
    token = TokenLogprob(5, -0.5, ((5, -0.5), (6, -1.0)), text_offset=3, rank=2)
    outputs = [
        RequestOutput("r", 1, "a", (5,), FinishReason.STOP, "e", (token,), (token, token), 7, 2),
        RequestOutput("r", 0, "", (), None),
    ]
    report = Report(1.0, outputs)
    assert pickle.loads(pickle.dumps(report)).outputs == outputs
