"""What a request need not compute is counted once: as a prefix hit, forked, or resumed."""

import pytest
from fakes import FakeTiers
from schedulers import BLOCK, fill_host_then_forget_device, make_request, make_scheduler, run

from hotset.engine.scheduler import Scheduler
from hotset.request import FinishReason
from hotset.sequence import Request


def counts(scheduler: Scheduler) -> tuple[int, int, int]:
    """Prefix hits, forked and resumed tokens so far."""
    metrics = scheduler.metrics
    return (
        metrics.cached_tokens.total(),
        metrics.forked_tokens,
        metrics.resumed_tokens.total(),
    )


def family(tokens: list[int], n: int) -> list[Request]:
    return [make_request(tokens, max_tokens=2) for _ in range(n)]


def run_all(scheduler: Scheduler) -> None:
    while scheduler.has_requests:
        run(scheduler)


def test_outputs_that_share_a_prompt_are_no_prefix_hits() -> None:
    scheduler = make_scheduler(num_blocks=20)
    first = family(list(range(9)), 4)
    scheduler.add(first)
    run_all(scheduler)
    assert counts(scheduler) == (0, 3 * 8, 0)
    assert [request.kv.num_cached_tokens for request in first] == [0] * 4
    again = family(list(range(9)), 4)
    scheduler.add(again)
    run_all(scheduler)
    assert counts(scheduler) == (8, 6 * 8, 0)
    assert [request.kv.num_cached_tokens for request in again] == [8] * 4


def test_an_output_that_waits_for_a_seat_is_forked_all_the_same() -> None:
    scheduler = make_scheduler(num_blocks=20, max_num_seqs=1)
    outputs = family(list(range(9)), 3)
    scheduler.add(outputs)
    run_all(scheduler)
    assert counts(scheduler) == (0, 2 * 8, 0)


@pytest.mark.parametrize("with_tiers", [False, True])
def test_own_kv_after_a_preemption_is_no_prefix_hit(
    fake_tiers: FakeTiers, with_tiers: bool
) -> None:
    scheduler = make_scheduler(fake_tiers if with_tiers else None)
    request = make_request(list(range(9)), max_tokens=9)
    scheduler.add([request])
    for _ in range(5):
        run(scheduler)
    scheduler._preempt_last()
    fake_tiers.end_all()
    if with_tiers:
        scheduler.kv.poll()
        scheduler.kv.pool.forget_cached()
    while scheduler.has_requests:
        run(scheduler)
        fake_tiers.end_all()
    assert request.kv.num_cached_tokens == 0
    assert counts(scheduler) == (0, 0, 13 if with_tiers else 12)
    assert scheduler.metrics.fetched_tokens == (13 if with_tiers else 0)


def test_what_others_computed_of_a_prompt_while_it_was_preempted_is_a_prefix_hit() -> None:
    scheduler = make_scheduler(num_blocks=16, budget=4)
    request = make_request(list(range(17)), max_tokens=1)
    scheduler.add([request])
    run(scheduler)
    scheduler._preempt_last()
    scheduler.waiting.clear()
    scheduler.add([make_request(list(range(17)), max_tokens=1)])
    run_all(scheduler)
    assert counts(scheduler) == (4, 0, 0)
    scheduler.waiting.append(request)
    run_all(scheduler)
    assert counts(scheduler) == (4 + 12, 0, 4)
    assert request.kv.num_cached_tokens == 12


def test_who_takes_over_a_prompt_does_not_find_it_a_second_time() -> None:
    scheduler = make_scheduler(num_blocks=16, budget=4)
    scheduler.add([make_request(list(range(8)), max_tokens=1)])
    run_all(scheduler)
    outputs = family(list(range(21)), 2)
    scheduler.add(outputs)
    run(scheduler)  # 8 tokens found, 4 computed
    scheduler.finish(outputs[0], FinishReason.ERROR)
    run_all(scheduler)
    assert counts(scheduler) == (8, 12, 0)
    assert outputs[1].kv.num_cached_tokens == 8


def test_content_counts_by_the_tier_that_had_it(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers)
    fill_host_then_forget_device(scheduler, fake_tiers, list(range(8)))
    request = make_request(list(range(9)), max_tokens=1)
    scheduler.add([request])
    run(scheduler)
    assert counts(scheduler) == (0, 0, 0)  # on its way
    fake_tiers.end_all()
    run_all(scheduler)
    assert scheduler.metrics.cached_tokens == {"host": 2 * BLOCK}
    assert request.kv.num_cached_tokens == 8 < request.prompt_len


def test_a_prefix_that_a_tier_cannot_tell_of_yet_is_looked_up_again(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers)
    tokens = list(range(9))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens[:8])
    known = dict(fake_tiers.stored)
    fake_tiers.stored.clear()
    fake_tiers.pending = set(known)
    request = make_request(tokens, max_tokens=1)
    scheduler.add([request])
    run(scheduler)
    assert scheduler.waiting == [request] and not fake_tiers.fetching
    fake_tiers.stored, fake_tiers.pending = known, set()
    run(scheduler)
    assert len(fake_tiers.fetching) == 2
    fake_tiers.end_all()
    run_all(scheduler)
    assert request.kv.num_cached_tokens == 8

    other = make_request(list(range(20, 29)), max_tokens=1)
    scheduler.add([other])
    run_all(scheduler)  # no tier has to think about it
    assert other.is_finished
