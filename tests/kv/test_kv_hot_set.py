"""Requests that turn hot: who may, what stays on the device, and what host memory keeps for it."""

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
