"""Requests that turn hot: who may, what stays on the device, and what host memory keeps for it."""

import pytest
from fakes import FakeTiers
from schedulers import BLOCK, make_request, make_scheduler, run

from hotset.cost.cache_spec import KEYS_ALONE
from hotset.engine.scheduler import Scheduler
from hotset.kv.hot_set import HotSet
from hotset.request import FinishReason, SamplingParams
from hotset.sequence import Request

PROMPT = list(range(21))  # five full blocks and one token


def running(
    tiers: FakeTiers, *requests: Request, num_blocks: int = 30, hot_blocks: int = 2
) -> tuple[Scheduler, HotSet]:
    """A scheduler whose requests decode, their full blocks in host memory."""
    scheduler = make_scheduler(
        tiers, num_blocks=num_blocks, budget=64, ahead_tokens=4, hot_blocks=hot_blocks
    )
    for request in requests:
        scheduler.add([request])
    run(scheduler)
    tiers.end_all()
    scheduler.kv.poll()
    assert scheduler.kv.hot is not None
    return scheduler, scheduler.kv.hot


def test_the_newest_blocks_stay_in_place_as_slots_and_the_others_are_given_back(
    fake_tiers: FakeTiers,
) -> None:
    request = make_request(PROMPT)
    scheduler, hot = running(fake_tiers, request)
    blocks = list(request.kv.block_table)
    before = scheduler.kv.pool.num_available

    assert hot.turn_hot(request) == 2

    assert request.kv.slot_blocks == blocks[3:5]
    *left, last = request.kv.block_table
    assert last == blocks[5] and not any(map(scheduler.kv.tables.is_whole, left))
    copies = list(zip(blocks[:3], left[:3], strict=True))
    assert scheduler.kv.tables.take_copies() == copies
    assert left[3:] == [block | KEYS_ALONE for block in blocks[3:5]]  # where they are
    assert scheduler.kv.pool.num_available == before + 2
    [reset] = (updates := hot.take_updates()).resets
    assert [part.start for part in reset.slot_blocks] == [3 * BLOCK, 4 * BLOCK]
    assert [place.block_index for place in updates.places] == [0, 1, 2, 3, 4]
    assert set(fake_tiers.kept) == set(request.kv.block_hashes[:5])
    # Others find what was given back on the device, but nothing that is a slot now.
    found = [scheduler.kv.pool.lookup(key) is not None for key in request.kv.block_hashes[:5]]
    assert found == [True, True, True, False, False]
    scheduler.kv.check()

    scheduler.finish(request, FinishReason.STOP)
    fake_tiers.end_all()  # of its last, partial block
    scheduler.kv.poll()
    assert scheduler.kv.pool.num_held == 0 and not fake_tiers.kept and not hot.num_hot
    scheduler.kv.check()


def test_a_block_leaves_once_its_copy_has_ended(fake_tiers: FakeTiers) -> None:
    request = make_request(PROMPT, max_tokens=8)
    scheduler, hot = running(fake_tiers, request)
    hot.turn_hot(request)
    hot.take_updates()
    while request.kv.num_computed_tokens < 6 * BLOCK:
        run(scheduler)
    scheduler.kv.poll()
    assert scheduler.kv.tables.is_whole(request.kv.block_table[5])  # its copy is under way
    fake_tiers.end_all()
    scheduler.kv.poll()
    assert not scheduler.kv.tables.is_whole(request.kv.block_table[5])
    [place] = hot.take_updates().places
    assert place.block_index == 5
    scheduler.kv.check()


def test_a_copy_that_host_memory_had_no_room_for_is_asked_for_again(fake_tiers: FakeTiers) -> None:
    request = make_request(PROMPT, max_tokens=8)
    scheduler, hot = running(fake_tiers, request)
    hot.turn_hot(request)
    fake_tiers.has_room = False
    while request.kv.num_computed_tokens < 6 * BLOCK:
        run(scheduler)
    scheduler.kv.poll()
    assert not fake_tiers.spilling
    fake_tiers.has_room = True
    scheduler.kv.poll()
    fake_tiers.end_all()
    scheduler.kv.poll()
    assert not scheduler.kv.tables.is_whole(request.kv.block_table[5])


def test_who_shares_blocks_keeps_them_and_they_are_no_slots(fake_tiers: FakeTiers) -> None:
    first = make_request(PROMPT)
    scheduler, hot = running(fake_tiers, first, hot_blocks=1)
    other = make_request([*PROMPT[:16], *range(90, 103)])
    scheduler.add([other])
    run(scheduler)
    fake_tiers.end_all()
    scheduler.kv.poll()
    assert first.kv.block_table[:4] == other.kv.block_table[:4]
    assert hot.turn_hot(first) == 0  # of its own it has one block, which would be its slots
    assert hot.turn_hot(other) == 1
    assert all(map(scheduler.kv.tables.is_whole, first.kv.block_table))
    run(scheduler)
    scheduler.kv.check()


def test_prompts_short_requests_and_those_with_several_outputs_stay_resident(
    fake_tiers: FakeTiers,
) -> None:
    short, several = make_request(list(range(50, 57))), make_request(PROMPT)
    several.params = SamplingParams(max_tokens=4, n=2)
    scheduler, hot = running(fake_tiers, short, several)
    prompt = make_request(list(range(200, 221)))
    scheduler.add([prompt])
    assert [hot.most_freed(request) for request in (short, several, prompt)] == [0, 0, 0]
    assert not hot.make_room(scheduler.running, 1)


def test_host_memory_that_cannot_keep_a_request_to_its_end_has_it_stay_resident() -> None:
    tiers = FakeTiers()
    tiers.num_slots = 6
    request = make_request(PROMPT, max_tokens=8)  # eight blocks at its end
    _, hot = running(tiers, request)
    assert hot.turn_hot(request) == 0
    tiers.num_slots = 8
    assert hot.turn_hot(request) == 2


def test_a_request_that_waits_has_others_turn_hot_only_where_more_are_to_run(
    fake_tiers: FakeTiers,
) -> None:
    first, second = make_request(PROMPT, max_tokens=9), make_request(list(range(100, 121)))
    scheduler, hot = running(fake_tiers, first, num_blocks=12, hot_blocks=1)
    most = {"users": 1}
    scheduler._users_at_once = lambda wanted, context: most["users"]
    scheduler.add([second])
    run(scheduler)
    assert scheduler.waiting == [second] and not hot.num_hot
    most["users"] = 2
    run(scheduler)
    assert scheduler.running == [first, second] and hot.num_hot == 1
    assert first.kv.seat is not None and scheduler.metrics.turned_hot == 1


def test_who_runs_out_of_blocks_has_another_turn_hot_before_any_is_preempted(
    fake_tiers: FakeTiers,
) -> None:
    first, second = (make_request([own, *PROMPT[1:]], max_tokens=20) for own in (50, 60))
    scheduler, hot = running(fake_tiers, first, second, num_blocks=13, hot_blocks=1)
    while not scheduler.metrics.turned_hot:
        run(scheduler)
        fake_tiers.end_all()
    while scheduler.has_requests:
        run(scheduler)
        fake_tiers.end_all()
        scheduler.kv.check()
    assert scheduler.metrics.preemptions == 0 and not hot.num_hot


def test_a_hot_request_that_is_preempted_is_kept_whole_in_host_memory_and_comes_back(
    fake_tiers: FakeTiers,
) -> None:
    request = make_request(PROMPT, max_tokens=8)
    scheduler, hot = running(fake_tiers, request)
    hot.turn_hot(request)
    run(scheduler)
    scheduler._preempt_last()
    scheduler.kv.check()
    assert not hot.num_hot and request.kv.slot_blocks == [] and request.kv.seat is None
    assert set(request.kv.block_hashes[:5]) <= set(fake_tiers.kept)
    assert set(fake_tiers.kept.values()) == {1}
    fake_tiers.end_all()
    while scheduler.has_requests:
        run(scheduler)
        fake_tiers.end_all()
    scheduler.kv.poll()
    assert scheduler.kv.pool.num_held == 0 and not fake_tiers.kept
    assert scheduler.metrics.recomputed_tokens == 0


def test_who_is_let_in_leaves_hot_requests_the_room_that_they_grow_into() -> None:
    """Else they would be preempted, as they have nothing left to give back."""
    tiers = FakeTiers()
    scheduler = make_scheduler(
        tiers, num_blocks=60, budget=256, ahead_tokens=32, hot_blocks=2, max_num_seqs=16
    )
    for first in range(14):
        scheduler.add([make_request([first, *range(1, 60)], max_tokens=200)])
    most = 0
    while scheduler.has_requests:
        run(scheduler)
        tiers.end_all()
        most = max(most, len(scheduler.running))
    assert most >= 4  # a resident one has 65 blocks at its end, and did not even fit alone
    assert scheduler.metrics.turned_hot == 14 and scheduler.metrics.preemptions == 0


def preempted(tiers: FakeTiers, num_blocks: int = 30) -> tuple[Scheduler, HotSet, Request]:
    """A hot request that was preempted within its seventh block, with all of it in host memory."""
    request = make_request(PROMPT, max_tokens=12)
    scheduler, hot = running(tiers, request, num_blocks=num_blocks)
    hot.turn_hot(request)
    while request.kv.num_computed_tokens < 6 * BLOCK + 1:
        run(scheduler)
        tiers.end_all()
        scheduler.kv.poll()
    hot.take_updates()
    scheduler._preempt_last()
    assert request.kv.seat is None and not request.kv.block_table and request.kv.was_hot
    tiers.end_all()
    scheduler.kv.poll()
    return scheduler, hot, request


def test_a_preempted_request_goes_on_hot_with_empty_slots_and_brings_up_index_keys_alone(
    fake_tiers: FakeTiers,
) -> None:
    scheduler, hot, request = preempted(fake_tiers)
    tail = request.kv.resume
    assert tail is not None

    run(scheduler)

    kv = request.kv
    assert kv.seat is not None and kv.num_index_blocks == 6 and len(kv.block_table) == 7
    assert [block for _, block in fake_tiers.fetching] == kv.block_table
    assert [key for key, _ in fake_tiers.fetching] == [*kv.block_hashes[:6], tail.key]
    assert scheduler.kv.tables.num_runnable_tokens(request) == 0
    [reset] = (updates := hot.take_updates()).resets
    assert [part.start for part in reset.slot_blocks] == [None, None]
    assert [place.block_index for place in updates.places] == list(range(6))
    assert set(fake_tiers.kept) == set(kv.block_hashes[:6])
    scheduler.kv.check()

    fake_tiers.end_all()
    scheduler.kv.poll()
    run(scheduler)
    assert kv.num_computed_tokens == request.num_tokens - 1 > 6 * BLOCK
    assert kv.resume is None and scheduler.metrics.recomputed_tokens == 0
    scheduler.kv.check()


def test_who_ends_while_index_keys_come_leaves_their_places_once_they_came(
    fake_tiers: FakeTiers,
) -> None:
    scheduler, _, request = preempted(fake_tiers)
    run(scheduler)
    pool, slots = scheduler.kv.pool, list(request.kv.slot_blocks)
    assert request.kv.block_table[:2] == [block | KEYS_ALONE for block in slots]
    fake_tiers.end_fetch()
    scheduler.kv.poll()

    scheduler.finish(request, FinishReason.ABORT)

    assert [pool.ref_count(block) for block in slots] == [0, 1]  # the other is to be written to

    index_blocks = scheduler.kv.tables.index_blocks
    assert index_blocks is not None and index_blocks.num_used == 5
    scheduler.kv.check()
    fake_tiers.end_all()
    scheduler.kv.poll()
    scheduler.kv.check()
    assert scheduler.kv.pool.num_held == 0 and index_blocks.num_used == 0
    assert not fake_tiers.kept


def test_a_preempted_request_is_resident_where_host_memory_lacks_some_of_it_or_it_saves_nothing(
    fake_tiers: FakeTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, hot, request = preempted(fake_tiers)
    assert hot.blocks_to_go_on(request) is not None
    monkeypatch.setattr(hot._seats, "blocks_per_seat", 6)  # of 7 blocks
    assert hot.blocks_to_go_on(request) is None
    monkeypatch.undo()
    key = request.kv.kept.pop(2)
    fake_tiers.unkeep(key)
    assert hot.blocks_to_go_on(request) is None
    run(scheduler)
    fake_tiers.end_all()
    scheduler.kv.poll()
    run(scheduler)
    assert request.kv.seat is None and request.kv.num_computed_tokens == request.num_tokens - 1
    assert all(map(scheduler.kv.tables.is_whole, request.kv.block_table))


def test_a_preempted_request_waits_for_the_copies_and_the_blocks_with_which_it_goes_on_hot(
    fake_tiers: FakeTiers,
) -> None:
    scheduler, hot, request = preempted(fake_tiers)
    needed = hot.blocks_to_go_on(request)
    assert needed is not None
    key = request.kv.block_hashes[4]
    fake_tiers.spilling[key] = fake_tiers.slots[key]  # as if its copy had not ended
    del fake_tiers.stored[key]
    assert not scheduler.kv.admit(request, spare_blocks=0, queued_tokens=0)
    del fake_tiers.spilling[key]
    fake_tiers.stored[key] = "host"
    taken = scheduler.kv.pool.allocate(scheduler.kv.pool.num_available - needed + 1)
    assert not scheduler.kv.admit(request, spare_blocks=0, queued_tokens=0)
    scheduler.kv.pool.release(taken.pop())
    assert not scheduler.kv.admit(request, spare_blocks=1, queued_tokens=0)
    assert scheduler.kv.admit(request, spare_blocks=0, queued_tokens=0)
    assert request.kv.seat is not None and scheduler.kv.pool.num_available == 0
