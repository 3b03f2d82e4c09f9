"""What an engine tells those that follow it: where its blocks are, and how busy it is."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import make_engine, run
from fakes import FakeClock
from servers import build

from hotset.engine.engine import Engine
from hotset.engine.following import Following
from hotset.engine.loop import EngineLoop
from hotset.engine.messages import Queued, Report, Submit
from hotset.memory.journal import TIERS, Journal, rows_of
from hotset.options import Options
from hotset.request import SamplingParams

_NONE = Queued(0, 0, 0)


def actual(engine: Engine) -> set[tuple[bytes, int]]:
    """The keys that the tiers have, each with the tier's number."""
    assert engine.tiers is not None
    sources = {"device": engine.kv.pool, **engine.tiers.sources()}
    found = {
        (key, TIERS.index(name)) for name, source in sources.items() for key in source.all_keys()
    }
    assert all(source.has(key) for source in sources.values() for key in source.all_keys())
    return found


def test_the_journal_of_an_engine_says_what_its_tiers_have(tmp_path: Path) -> None:
    engine = make_engine(hot_blocks=30, host_blocks=12, disk_mib=2.2, disk_path=tmp_path)
    following = Following(engine, FakeClock())
    told: set[tuple[bytes, int]] = set()

    def take() -> None:
        part, _ = following.news(1)
        if part is None:
            return
        for key, tier, is_there in rows_of(part.changes):
            (told.add if is_there else told.discard)((key, tier))
        if part.content is not None:
            told.update((key, tier) for key, tier, _ in rows_of(part.content))

    rng = random.Random(1)
    bases = [[rng.randrange(3, 60) for _ in range(30)] for _ in range(4)]
    run(engine, bases[:2])
    take()
    assert not told  # nobody follows
    following.follow(True)
    for number in range(6):
        prompts = [[*base[: rng.randrange(9, 30)], 5 + number] for base in bases]
        run(engine, prompts, max_tokens=9, each_step=take)
    engine.scheduler.kv.transfers.discard(engine_keys := sorted(key for key, _ in told)[:9])
    while engine.has_transfers:
        engine.step()
    take()
    assert told == actual(engine)
    assert {tier for _, tier in told} == {0, 1, 2}
    assert not {key for key, _ in told} & set(engine_keys)
    engine.close()


def test_the_load_counts_what_waits_and_what_runs() -> None:
    engine, clock = make_engine(hot_blocks=40), FakeClock()
    following = Following(engine, clock)
    one = SamplingParams(max_tokens=2)
    following.arrive(Submit("a", [5] * 20, one, expected_tokens=3))
    following.arrive(Submit("b", [5] * 9, one))
    assert following.news(2) == (None, None)  # nobody follows
    following.follow(True)
    _, load = following.news(2)
    assert load is not None and (load.queued_tokens, load.num_open) == (12, 2)
    # 3 tokens behind 17 others, and 9 from the first on.
    assert load.queue == (_NONE, _NONE, Queued(1, 3, 55), _NONE, Queued(1, 9, 40))
    assert (load.usable_blocks, load.spare_blocks) == (40, 40 - 8)  # of 4 tokens
    following.start("a")
    assert following.news(2)[1] is None  # not due
    clock.now_s = 0.2
    _, load = following.news(2)
    assert load is not None and load.queued_tokens == 9
    following.start("b")
    following.start("b")
    run(engine, [[5] * 20])
    _, load = following.news(0)  # at once, as nothing more may come for long
    assert load is not None and (load.queued_tokens, load.num_open) == (0, 0)
    assert load.prefilled_tokens >= 19 and load.freed_blocks == 8
    assert set(load.queue) == {_NONE}
    assert 0 < load.prompt_step_s < engine.metrics.step_s
    assert following.news(0)[1] is None  # it is the same
    engine.close()


def test_the_load_tells_what_a_token_takes_by_those_before_it() -> None:
    engine = make_engine(hot_blocks=40)
    following = Following(engine, FakeClock())
    following.follow(True)
    _, load = following.news(0)
    assert load is not None and (load.token_s, load.pair_s) == (0.0, 0.0)  # not known yet
    for context in range(0, 100_000, 1000):
        engine.context_cost.observe(context, 2e-5 * (1 + context / 12_500))
    _, load = following.news(0)
    assert load is not None and load.token_s == pytest.approx(2e-5, rel=0.01)
    assert load.pair_s == pytest.approx(2e-5 / 12_500, rel=0.01)
    engine.close()


def test_steps_of_prompts_tell_how_many_tokens_are_before_theirs() -> None:
    engine = make_engine(hot_blocks=40, max_num_batched_tokens=45)
    seen: list[tuple[float, float]] = []
    engine.context_cost.observe = lambda x, y: seen.append((x, y))  # type: ignore[method-assign]
    run(engine, [[5 + i for i in range(90)]], max_tokens=3)
    assert [x for x, _ in seen] == [22.5, 67.5]  # tokens 0 to 44 and 45 to 89; no decodes
    assert all(y > 0 for _, y in seen)
    engine.close()


def test_reports_bring_journal_and_load_while_somebody_follows() -> None:
    reports: list[Report] = []
    host = EngineLoop(Options.of(hot_gib=0.01), build, reports.append)

    def ask(request_id: str) -> list[Report]:
        reports.clear()
        host.submit(Submit(request_id, list(range(5, 45)), SamplingParams(max_tokens=3)))
        wait(lambda: any(o.finish_reason for report in reports for o in report.outputs))
        return list(reports)

    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(4000):
            if condition():
                return
            time.sleep(0.005)
        raise AssertionError("it did not happen")

    try:
        assert all(one.journal is None and one.load is None for one in ask("a"))
        reports.clear()
        host.follow(True)
        wait(lambda: any(report.journal and report.journal.ends for report in reports))
        [part] = [report.journal for report in reports if report.journal]
        assert part.content is not None and part.begins
        assert len(list(rows_of(part.content))) >= 2  # 40 tokens in blocks of 16
        assert any(report.load for report in reports)
        assert host.info.block_size == 16 and host.info.kv_bytes_per_token > 0
        assert host.info.fingerprint
        host.follow(False)
        assert all(one.journal is None and one.load is None for one in ask("b")[-1:])
    finally:
        host.close()


def test_a_journal_leaves_out_tiers_that_it_has_no_number_for() -> None:
    engine = make_engine(hot_blocks=40)
    journal = Journal({"shelf": engine.kv.pool})
    journal.follow(True)
    part = journal.take()
    assert part is not None and part.ends and part.content == b""
    engine.close()
