import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from servers import wait_for
from stores import SECRET, FakeStore
from tiny_engine import build

from hotset.engine.loop import EngineLoop
from hotset.engine.messages import Report, Submit
from hotset.errors import DrainingError
from hotset.metrics import Metrics
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput, Resumed, SamplingParams

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


class Reader:
    """What the reports of a loop had, by output."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], list[RequestOutput]] = defaultdict(list)
        self.reasons: Counter[FinishReason] = Counter()
        self.notes: list[str] = []
        self._lock = threading.Lock()

    def take(self, report: Report) -> None:
        assert report.failure is None
        with self._lock:
            self.notes += report.notes
            for output in report.outputs:
                self.outputs[output.request_id, output.index].append(output)
                if output.finish_reason is not None:
                    self.reasons[output.finish_reason] += 1

    def token_ids(self, request_id: str, index: int = 0) -> list[int]:
        return [i for output in self.outputs[request_id, index] for i in output.token_ids]


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def loop(reader: Reader) -> Iterator[EngineLoop]:
    loop = EngineLoop(Options.of(hot_gib=0.01, max_num_seqs=4), build, reader.take)
    yield loop
    loop.close()


def test_a_drained_engine_ends_what_is_left_as_moved_and_leaks_no_block(
    loop: EngineLoop, reader: Reader
) -> None:
    ids = [f"r{i}" for i in range(6)]
    for i, request_id in enumerate(ids):  # some of them wait, as 4 sequences run at once
        loop.submit(
            Submit(
                request_id,
                [5 + i] * 20,
                SamplingParams(max_tokens=400, ignore_eos=True, n=1 + i % 2, stop=("zzz",)),
            )
        )
    wait_for(lambda: len(reader.token_ids("r0")) > 3)
    loop.drain(0.0)
    wait_for(lambda: sum(reader.reasons.values()) == 9)
    assert reader.reasons == {FinishReason.MOVED: 9}
    lasts = [outputs[-1] for outputs in reader.outputs.values()]
    assert len(lasts) == 9
    # What was held back of a text belongs to what goes on elsewhere.
    assert all(one.finish_reason is FinishReason.MOVED and not one.text for one in lasts)
    assert loop._engine.kv.pool.num_held == 0
    loop._engine.kv.check()
    assert loop.metrics.requests_finished == {"moved": 9}


def test_requests_that_end_in_time_are_not_moved(loop: EngineLoop, reader: Reader) -> None:
    loop.submit(Submit("short", [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True)))
    loop.drain(60.0)
    with pytest.raises(DrainingError, match="takes no more requests: it is about to end"):
        loop.submit(Submit("late", [5, 6, 7], LONG))
    wait_for(lambda: reader.reasons)
    assert reader.reasons == {FinishReason.LENGTH: 1}
    assert len(reader.token_ids("short")) == 3


def test_the_earliest_of_several_drains_counts(loop: EngineLoop, reader: Reader) -> None:
    loop.submit(Submit("long", [5, 6, 7], LONG))
    for seconds in (60.0, 0.0, 60.0):
        loop.drain(seconds)
    wait_for(lambda: reader.reasons)
    assert reader.reasons == {FinishReason.MOVED: 1}
    assert loop.is_alive  # what it has in its tiers can still be written


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    with contextlib.closing(FakeStore(tmp_path)) as store:
        yield store


def sharing(store: FakeStore, tmp_path: Path) -> Options:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    return Options.of(
        hot_gib=0.01,
        host_gib=0.01,
        remote=store.url,
        remote_secret_file=secret,
        fetch_policy="fetch",
    )


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_what_a_drain_leaves_in_a_store_the_next_engine_goes_on_from(
    family: str, store: FakeStore, tmp_path: Path
) -> None:
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    prompts = {f"r{i}": [5 + i] * 150 for i in range(3)}
    delivered: dict[str, list[int]] = {request_id: [] for request_id in prompts}

    def run(options: Options, *, moves: bool) -> Metrics:
        """Go on with all, up to a drain that moves them if that is wanted."""
        reader = Reader()
        with contextlib.closing(
            EngineLoop(options, partial(build, family=family), reader.take)
        ) as loop:
            for request_id, prompt in prompts.items():
                resumed = [Resumed(0, ids)] if (ids := tuple(delivered[request_id])) else ()
                loop.submit(Submit(request_id, prompt, params, resumed=resumed))
            wait_for(lambda: not moves or len(reader.token_ids("r2")) > 40)
            loop.drain(0.0 if moves else 60.0)
            wait_for(lambda: reader.reasons.total() == 3)
        for request_id, ids in delivered.items():
            ids += reader.token_ids(request_id)
        assert reader.reasons == {FinishReason.MOVED if moves else FinishReason.LENGTH: 3}
        assert not reader.notes and not loop.metrics.faults.total()
        return loop.metrics

    run(sharing(store, tmp_path), moves=True)
    metrics = run(sharing(store, tmp_path), moves=False)
    # Blocks of 16 tokens; states are kept each 64.
    assert metrics.resumed_tokens["remote"] >= 3 * (176 if family == "llama" else 128)
    moved = {request_id: list(ids) for request_id, ids in delivered.items()}
    for ids in delivered.values():
        ids.clear()
    run(Options.of(hot_gib=0.01), moves=False)
    assert moved == delivered


def test_what_was_not_written_in_time_is_told(
    store: FakeStore, tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SETTLE_S", "_DRAIN_S"):
        monkeypatch.setattr(f"hotset.engine.loop.{name}", 0.0)
    loop = EngineLoop(sharing(store, tmp_path), build, reader.take)
    store.replies[b"SET"] = lambda *words: None  # it never answers
    loop.submit(Submit("r", [5] * 40, SamplingParams(max_tokens=1)))
    wait_for(lambda: reader.reasons)
    loop.drain(0.0)
    loop.close()
    assert reader.notes[-1] == "3 KV blocks were not written in time; others compute them again"
