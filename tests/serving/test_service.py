import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from servers import build

from hotset.config import EngineConfig
from hotset.engine.completion import gather
from hotset.engine.engine import Engine
from hotset.engine.service import EngineService
from hotset.errors import ConfigError, EngineError, RequestError
from hotset.model.loaded import LoadedModel
from hotset.request import SamplingParams

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


def make_service() -> EngineService:
    return EngineService(EngineConfig(hot_gib=0.01), build=build)


@pytest.fixture
def service() -> Iterator[EngineService]:
    service = make_service()
    yield service
    service.close()


def wait_for(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


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
    def build_failing(config: EngineConfig) -> tuple[Engine, LoadedModel]:
        engine, loaded = build(config)

        def fail() -> None:
            raise ValueError("broken\nstep")

        engine.step = fail  # type: ignore[method-assign, assignment]
        return engine, loaded

    service = EngineService(EngineConfig(hot_gib=0.01), build=build_failing)
    [completion] = gather(service.submit([5, 6], LONG), 1)
    assert completion.finish_reason == "error"
    assert completion.error == "the engine has failed: ValueError: broken step"
    assert not service.healthy
    with pytest.raises(EngineError, match="broken"):
        service.submit([5], SamplingParams())
    service.close()


def test_an_engine_that_cannot_be_built_raises_in_the_constructor() -> None:
    def refuse(config: EngineConfig) -> tuple[Engine, LoadedModel]:
        raise ConfigError("too small")

    with pytest.raises(ConfigError, match="too small"):
        EngineService(EngineConfig(), build=refuse)


def write_batch(path: Path) -> None:
    body = {"prompt": "the cat", "max_tokens": 3, "temperature": 0}
    lines = [
        json.dumps({"custom_id": str(i), "url": "/v1/completions", "body": body}) for i in range(6)
    ]
    lines[2] = "not json"
    lines[4] = lines[0]  # its custom_id again
    path.write_text("\n".join(lines))


def outcome(path: Path) -> list[tuple[Any, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["custom_id"], r["response"] and r["response"]["body"]["choices"]) for r in records]


def test_a_batch_cut_at_any_byte_goes_on_to_the_same_output(
    service: EngineService, tmp_path: Path
) -> None:
    source, whole, torn = tmp_path / "in", tmp_path / "whole", tmp_path / "torn"
    write_batch(source)
    batch = Batch(source, whole)
    summary = batch.run(service, window=2)
    batch.close()
    assert (summary.lines, summary.errors) == (6, 2)
    expected = outcome(whole)
    assert [custom_id for custom_id, _ in expected] == ["0", "1", None, "3", "0", "5"]

    content = whole.read_bytes()
    for end in range(0, len(content) + 1, max(1, len(content) // 7)):
        torn.write_bytes(content[:end])
        batch = Batch(source, torn)
        batch.run(service, window=3)
        batch.close()
        assert outcome(torn) == expected


def test_an_output_of_another_input_is_refused_and_left_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    others = ('{"custom_id": "other"}\n', "my notes\nand more\n", "my notes\n", "my notes")
    for content in others:
        target.write_text(content)
        with pytest.raises(ConfigError, match="choose another output"):
            Batch(source, target)
        assert target.read_text() == content
    with pytest.raises(ConfigError, match="both input and output"):
        Batch(source, source)
    with pytest.raises(ConfigError, match="/dev/full is not a plain file"):
        Batch(source, Path("/dev/full"))


DEEP_LINE = '{"custom_id": "deep", "url": "/v1/completions", "body": ' + "[" * 100_000


def test_a_line_that_cannot_be_parsed_costs_the_others_nothing(
    service: EngineService, tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    lines = source.read_bytes().splitlines()
    lines[1], lines[3] = DEEP_LINE.encode(), b'{"custom_id": "\xff"}'
    source.write_bytes(b"\n".join(lines))
    batch = Batch(source, target)
    summary = batch.run(service, window=4)
    batch.close()

    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert (summary.lines, summary.errors) == (6, 4)
    assert [bool(record["response"]) for record in records] == [True, *[False] * 4, True]
    assert records[1]["error"] == {
        "code": "invalid_json",
        "message": "the line is nested too deeply: more than 200 levels",
    }
    assert "is not UTF-8" in records[3]["error"]["message"]


def test_a_bug_that_one_line_shows_is_that_lines_error(
    service: EngineService, tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    admission = Admission(service, PromptEncoder(service.model), UNLIMITED)
    calls = iter(range(10))

    def submit(request: GenerationRequest) -> Admitted:
        if next(calls) == 1:
            raise IndexError("a bug")
        return admission.submit(request, Tenant(), is_batch=True)

    batch = Batch(source, target)
    summary = batch.run(service, window=2, submit=submit)
    batch.close()
    assert (summary.lines, summary.errors) == (6, 3)
    assert json.loads(target.read_text().splitlines()[1])["response"]["status_code"] == 500


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

    def build_warming(config: EngineConfig) -> tuple[Engine, LoadedModel]:
        engine, loaded = build(config)
        engine.close()
        made.append(WarmingEngine(config, loaded))
        return made[0], loaded

    caplog.set_level("INFO", "hotset")
    service = EngineService(EngineConfig(hot_gib=0.01), build=build_warming)
    try:
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        assert len(gather(service.submit([5, 6], params), 1)[0].token_ids) == 3
        wait_for(lambda: "warm now" in caplog.messages)
        assert made[0].num_pieces == 0 and made[0].num_waits == 0
        assert len(gather(service.submit([5, 6], params), 1)[0].token_ids) == 3
    finally:
        service.close()
