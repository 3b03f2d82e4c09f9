import threading
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
from servers import wait_for
from tiny_engine import build

from hotset.engine.loop import EngineLoop
from hotset.engine.messages import Report, Submit
from hotset.errors import DrainingError
from hotset.options import Options
from hotset.request import FinishReason, RequestOutput, SamplingParams

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


class Reader:
    """What the reports of a loop had, by output."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], list[RequestOutput]] = defaultdict(list)
        self.reasons: Counter[FinishReason] = Counter()
        self._lock = threading.Lock()

    def take(self, report: Report) -> None:
        assert report.failure is None
        with self._lock:
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
