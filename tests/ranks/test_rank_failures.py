"""A rank that ends, raises or hangs: requests end with a line that names it; all start again."""

import os
import queue
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import make_prompts, reference
from rank_engines import BAD_TOKEN, build_failing, family_of

from hotset.engine.completion import gather
from hotset.engine.restarts import Restarts
from hotset.engine.service import EngineService
from hotset.errors import EngineError
from hotset.options import Options
from hotset.ranks.log import Op, command, key_numbers
from hotset.ranks.messages import Failed, Moved, RankReport
from hotset.ranks.rank import Replay
from hotset.request import SamplingParams

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module", params=["tp", pytest.param("dp", marks=pytest.mark.many)])
def service(request: pytest.FixtureRequest) -> Iterator[EngineService]:
    sizes = {"hot_gib": 0.01} if request.param == "tp" else {}
    options = Options.of(
        device="cpu", max_model_len=500, step_timeout_s=2.0, **sizes, **{request.param: 2}
    )
    service = EngineService(options, build=build_failing)
    yield service
    children = ranks_of(service)
    service.close()
    assert not any(is_running(pid) for pid in children)


def ranks_of(service: EngineService) -> list[int]:
    """Ids of the engine's process and of the other rank's."""
    engine = service._host._process.pid
    children = Path(f"/proc/{engine}/task").glob("*/children")
    return [engine, *(int(pid) for file in children for pid in file.read_text().split())]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_until(condition: object, most_s: float) -> None:
    deadline_s = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def check_serves(service: EngineService) -> None:
    """Wait for the next start, and compare an answer."""
    wait_until(lambda: service.healthy, 120.0)
    prompt = make_prompts()[0]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    [answer] = gather(service.submit(prompt, params), 1)
    assert answer.error is None
    assert [list(answer.token_ids)] == reference(family_of(service.options), [prompt])


@pytest.mark.parametrize("fault", ["killed", "raises", "hangs", "driver killed"])
def test_every_request_ends_with_a_line_that_names_the_rank(
    fault: str, service: EngineService
) -> None:
    service._restarts = Restarts()  # each fault counts for itself
    check_serves(service)
    before = ranks_of(service)
    assert len(before) == 2
    streams = [service.submit(prompt, LONG) for prompt in make_prompts()[:3]]
    next(iter(streams[0]))  # they run
    streams = [service.submit(prompt, LONG) for prompt in make_prompts()[:3]]
    if fault == "raises":
        # So long that each lane gets one, where there are lanes.
        streams += [service.submit([i] * 99 + [BAD_TOKEN], LONG) for i in (5, 6, 7)]
    else:
        victim = before["driver" not in fault]
        os.kill(victim, signal.SIGKILL if "killed" in fault else signal.SIGSTOP)
    ended = [gather(stream, 1)[0] for stream in streams]
    expected = {
        "killed": "rank 1: its process has been ended by signal 9 (Killed)",
        "raises": f"rank 1: ValueError: token {BAD_TOKEN} was met",
        "driver killed": "rank 0: its process has been ended by signal 9 (Killed)",
        "hangs": "rank 1: no step has ended for 2 seconds",
    }
    assert {one.error for one in ended} == {expected[fault]}
    with pytest.raises(EngineError, match=r"rank [01]: "):
        service.submit([5], LONG)
    check_serves(service)
    wait_until(lambda: not any(is_running(pid) for pid in before), 10.0)


def test_a_thread_that_moves_blocks_to_disk_answers_whatever_it_raises() -> None:
    class Slab:
        def write(self, *_: object) -> Moved:
            raise ValueError("no such slot")

    reports: queue.SimpleQueue[RankReport] = queue.SimpleQueue()
    host = SimpleNamespace(view=lambda slot: memoryview(b""))
    rank: Any = SimpleNamespace(slab=Slab(), host=host, copier=None, experts=None)
    replay = Replay(rank, reports.put)
    replay.run(command(Op.WRITE, (1, 0, 0), key_numbers(b"key")).tobytes())
    assert reports.get(timeout=60) == Failed("ValueError: no such slot")


def test_starts_are_few_and_far_between() -> None:
    class Now:
        now_s = 0.0

        def now(self) -> float:
            return self.now_s

    clock = Now()
    restarts = Restarts(clock)
    assert [restarts.next_delay_s() for _ in range(4)] == [1.0, 2.0, 4.0, None]
    clock.now_s = 605.0
    assert restarts.next_delay_s() is not None
