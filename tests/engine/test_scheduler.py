"""The scheduler with its KV cache, over tiers without bytes."""

import random

import pytest
from fakes import FakeClock, FakeDevice, FakeTiers
from schedulers import (
    BLOCK,
    fill_host_then_forget_device,
    make_request,
    make_scheduler,
    run,
    tokens_of,
)

from hotset.engine.scheduler import Scheduler
from hotset.kv.block_hash import block_hash, root_hash
from hotset.request import FinishReason
from hotset.sequence import Request, RequestStatus


def test_prompts_take_a_smaller_share_of_a_step_that_also_decodes() -> None:
    scheduler = make_scheduler(budget=16, mixed_budget=5)
    scheduler.add([make_request(list(range(5)))])
    scheduler.add([make_request(list(range(50, 58)))])
    assert tokens_of(run(scheduler)) == [(0, 5), (0, 8)]  # nobody decodes yet
    scheduler.add([make_request(list(range(20, 24)))])
    assert tokens_of(run(scheduler)) == [(5, 1), (8, 1), (0, 3)]
    assert tokens_of(run(scheduler)) == [(6, 1), (9, 1), (3, 1)]


def test_prompts_come_first_while_more_wait_than_decode_and_all_have_room() -> None:
    def prompt(first: int) -> list[Request]:
        return [make_request(list(range(first, first + 8)))]

    scheduler = make_scheduler(budget=16, mixed_budget=4, bursts=True, num_blocks=40)
    for first in (0, 50, 100, 150, 200):
        scheduler.add(prompt(first))
    assert tokens_of(run(scheduler)) == [(0, 8), (0, 8)]
    # Two decode and three wait, with room for all.
    assert tokens_of(run(scheduler)) == [(8, 1), (8, 1), (0, 8), (0, 6)]
    # Three decode and two do not yet: one of four tokens is left for those.
    assert tokens_of(run(scheduler)) == [(9, 1), (9, 1), (8, 1), (6, 1)]

    scheduler = make_scheduler(budget=16, mixed_budget=4, bursts=True, num_blocks=14)
    for first in (0, 50, 100, 150, 200):
        scheduler.add(prompt(first))
    assert tokens_of(run(scheduler)) == [(0, 8), (0, 8)]
    assert tokens_of(run(scheduler)) == [(8, 1), (8, 1), (0, 2)]  # five would need 15 blocks


def test_a_step_leaves_the_prompt_tokens_beyond_a_tile_to_the_next_while_others_wait() -> None:
    def prompt(first: int, length: int) -> list[Request]:
        return [make_request(list(range(first, first + length)))]

    scheduler = make_scheduler(budget=16, row_tile=4, max_num_seqs=2)
    scheduler.add(prompt(0, 5))
    scheduler.add(prompt(50, 6))
    scheduler.add(prompt(100, 2))
    assert tokens_of(run(scheduler)) == [(0, 5), (0, 3)]
    assert tokens_of(run(scheduler)) == [(5, 1), (3, 3)]  # a tile
    assert tokens_of(run(scheduler)) == [(6, 1), (6, 1)]  # less than one
    run(scheduler)
    # The last one runs, nobody waits: all its tokens are taken, now as before.
    assert tokens_of(run(scheduler)) == [(8, 1), (0, 2)]

    scheduler = make_scheduler(budget=16, row_tile=4, max_num_seqs=2)
    for first, length in ((0, 5), (50, 2), (100, 2)):
        scheduler.add(prompt(first, length))
    # Three of seven tokens are beyond a tile: the second prompt has no part in this step.
    assert tokens_of(run(scheduler)) == [(0, 4)]
    assert tokens_of(run(scheduler)) == [(4, 1), (0, 2)]
    assert scheduler.kv.pool.num_free + 2 + 1 == 8


def test_who_ends_soon_makes_room_for_who_comes() -> None:
    """Blocks that come free before others grow into them are let to a newcomer."""
    scheduler = make_scheduler(budget=64, num_blocks=13)
    for first in (0, 100):
        scheduler.add([make_request(list(range(first, first + 13)), max_tokens=8)])
    run(scheduler)
    assert [len(request.kv.block_table) for request in scheduler.running] == [4, 4]
    # At their ends they have 4 + 6 + 4 blocks, but the first is gone before the others grow.
    scheduler.running[0].max_total_tokens = 15
    scheduler.add([make_request(list(range(200, 205)), max_tokens=8)])
    assert [item.num_tokens for item in run(scheduler).items] == [1, 1, 5]
    while scheduler.has_requests:
        run(scheduler)
    assert scheduler.metrics.preemptions == 0


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget() -> None:
    scheduler = make_scheduler(budget=6)
    scheduler.add([make_request(list(range(14)))])
    assert [tokens_of(run(scheduler)) for _ in range(4)] == [
        [(0, 6)],
        [(6, 6)],
        [(12, 2)],
        [(14, 1)],
    ]


def test_decodes_go_before_new_prompts_and_share_the_budget() -> None:
    scheduler = make_scheduler(budget=6)
    scheduler.add([make_request([1, 2, 3])])
    run(scheduler)
    scheduler.add([make_request(list(range(20, 30)))])
    assert tokens_of(run(scheduler)) == [(3, 1), (0, 5)]


def test_requests_run_first_come_first_served_within_a_priority() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    late = make_request([1], arrival_s=2.0)
    early = make_request([2], arrival_s=1.0)
    urgent = make_request([3], arrival_s=3.0, priority=-1)
    for request in (late, early, urgent):
        scheduler.add([request])
    assert scheduler.waiting == [urgent, early, late]


def test_a_second_prompt_with_the_same_prefix_computes_only_its_own_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1)])
    run(scheduler)
    scheduler.add([make_request([1, 2, 3, 4, 5, 6, 7, 8, 50])])
    assert tokens_of(run(scheduler)) == [(8, 1)]


def test_generated_tokens_are_part_of_the_prefix_a_next_turn_finds() -> None:
    scheduler = make_scheduler()
    first = make_request([1, 2, 3], max_tokens=6)
    scheduler.add([first])
    while scheduler.has_requests:
        run(scheduler)
    # The last token was sampled but never computed: 8 of 9 tokens have KV.
    scheduler.add([make_request([*first.token_ids, 70, 71])])
    assert tokens_of(run(scheduler)) == [(8, 3)]


def test_another_salt_finds_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request([1, 2, 3, 4, 5], max_tokens=1, salt=b"alice")])
    run(scheduler)
    scheduler.add([make_request([1, 2, 3, 4, 5], salt=b"bob")])
    assert tokens_of(run(scheduler)) == [(0, 5)]


def test_hash_chains_differ_by_model_salt_and_every_earlier_token() -> None:
    roots = {root_hash("a", b""), root_hash("b", b""), root_hash("a", b"s")}
    assert len(roots) == 3
    root = root_hash("a", b"")
    chains = {block_hash(block_hash(root, first), [5, 6]) for first in ([1, 2], [1, 3], [2, 1])}
    assert len(chains) == 3
    assert all(len(key) * 8 >= 128 for key in roots | chains)


def test_the_youngest_is_preempted_and_recomputes_without_a_tier() -> None:
    # With more tokens ahead only one would be let in.
    scheduler = make_scheduler(num_blocks=6, prefix_caching=False, ahead_tokens=1)
    old = make_request(list(range(7)), max_tokens=9, arrival_s=1.0)
    young = make_request(list(range(50, 57)), max_tokens=9, arrival_s=2.0)
    scheduler.add([old])
    scheduler.add([young])
    while young.queue.num_preemptions == 0:
        run(scheduler)
        scheduler.kv.check()
    assert old.queue.num_preemptions == 0 and young.status is RequestStatus.WAITING
    while scheduler.has_requests:
        run(scheduler)
        scheduler.kv.check()
    assert scheduler.metrics.recomputed_tokens > 0
    assert young.num_output_tokens == 9


def test_a_preempted_request_comes_back_with_its_partial_block(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers, num_blocks=6, ahead_tokens=1)
    old = make_request(list(range(7)), max_tokens=9, arrival_s=1.0)
    young = make_request(list(range(50, 57)), max_tokens=9, arrival_s=2.0)
    scheduler.add([old])
    scheduler.add([young])
    while scheduler.has_requests:
        run(scheduler)
        scheduler.kv.check()
        fake_tiers.end_all()
    assert young.queue.num_preemptions > 0
    assert scheduler.metrics.recomputed_tokens == 0
    assert old.num_output_tokens == young.num_output_tokens == 9


def test_a_full_block_is_spilled_once_as_soon_as_it_is_full(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers)
    scheduler.add([make_request(list(range(9)), max_tokens=3)])
    run(scheduler)
    assert len(fake_tiers.spilling) == 2
    fake_tiers.end_all()
    scheduler.kv.poll()
    scheduler.add([make_request(list(range(9)), max_tokens=3)])
    run(scheduler)
    assert not fake_tiers.spilling


def test_a_prefix_in_a_colder_tier_is_fetched_and_not_computed(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers)
    tokens = list(range(9))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    request = make_request(tokens)
    scheduler.add([request])
    assert not run(scheduler).items  # both blocks are on their way
    assert len(fake_tiers.fetching) == 2
    fake_tiers.end_all()
    assert tokens_of(run(scheduler)) == [(8, 1)]
    assert scheduler.metrics.cached_tokens["host"] == 8


def first_step(scheduler: Scheduler, request: Request) -> list[tuple[int, int]]:
    """Let a request in, and run until its first token of prompt is computed."""
    scheduler.add([request])
    while not (plan := run(scheduler)).items:
        continue
    return tokens_of(plan)


def test_the_next_turn_finds_the_last_partial_block_of_the_one_before(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers)
    first = make_request(list(range(8)), max_tokens=4)
    scheduler.add([first])
    while scheduler.has_requests:
        run(scheduler)
    assert first.kv.num_computed_tokens == 0 and first.num_tokens == 12  # 11 were computed
    [*_, (key, block)] = fake_tiers.spilling.items()
    assert scheduler.kv.pool.lookup(key) == block
    fake_tiers.end_all()
    turn = [*first.token_ids, 50, 51]
    other = [*first.token_ids[:10], 70, 71, 72]  # goes on otherwise
    assert first_step(scheduler, make_request(other, max_tokens=1)) == [(8, 5)]
    assert first_step(scheduler, make_request(turn, max_tokens=2)) == [(11, 3)]
    assert scheduler.kv.pool.lookup(key) is None  # it is written to
    while scheduler.has_requests:
        run(scheduler)
    # Two at once from host memory: the first has it, the other has what that one makes of it.
    fake_tiers.end_all()
    scheduler.kv.poll()
    scheduler.kv.pool.forget_cached()
    for _ in range(2):
        scheduler.add([make_request([*first.token_ids[:11], 60, 61, 62], max_tokens=1)])
    run(scheduler)
    assert [key for key, _ in fake_tiers.fetching].count(key) == 1
    fake_tiers.end_all()
    assert tokens_of(run(scheduler)) == [(11, 3)]
    assert tokens_of(run(scheduler)) == [(12, 2)]
    scheduler.kv.check()


def test_the_next_turn_finds_the_last_partial_block_while_it_is_copied_down(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers)
    first = make_request(list(range(8)), max_tokens=4)
    scheduler.add([first])
    while scheduler.has_requests:
        run(scheduler)
    [*_, block] = fake_tiers.spilling.values()
    turn = make_request([*first.token_ids, 50, 51], max_tokens=2)
    scheduler.add([turn])
    plan = run(scheduler)
    assert tokens_of(plan) == [(11, 3)]
    [(source, own)] = plan.copies  # the copy down reads its block until it has ended
    assert source == block and turn.kv.block_table[2] == own != block
    fake_tiers.end_all()
    while scheduler.has_requests:
        run(scheduler)
    scheduler.kv.check()
    fake_tiers.end_all()
    scheduler.kv.poll()
    assert scheduler.kv.pool.num_held == 0


def test_a_request_without_room_leaves_the_partial_block_to_be_found() -> None:
    scheduler = make_scheduler(num_blocks=6)
    first = make_request(list(range(8)), max_tokens=4)
    scheduler.add([first])
    while scheduler.has_requests:
        run(scheduler)
    turn = [*first.token_ids, 50, 51]
    long = make_request([*turn, *range(60, 60 + 3 * BLOCK)], max_tokens=1)
    assert not scheduler.kv.admit(long, spare_blocks=0, queued_tokens=0)
    scheduler.kv.check()
    assert first_step(scheduler, make_request(turn, max_tokens=1)) == [(11, 3)]


def test_a_partial_block_is_recomputed_where_it_is_lost() -> None:
    scheduler = make_scheduler()
    first = make_request(list(range(8)), max_tokens=4)
    scheduler.add([first])
    while scheduler.has_requests:
        run(scheduler)
    turn = [*first.token_ids, 50, 51]
    scheduler.kv.pool.forget_cached()
    assert first_step(scheduler, make_request(turn, max_tokens=1)) == [(0, 14)]
    # A prompt that ends within it has a token left to compute all the same.
    assert first_step(scheduler, make_request(turn[:11], max_tokens=1)) == [(8, 3)]
    assert first_step(scheduler, make_request([*turn, 1], max_tokens=1)) == [(14, 1)]


def test_two_requests_that_want_the_same_block_share_one_load(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers)
    tokens = list(range(9))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    first, second = make_request(tokens), make_request([*tokens, 99])
    scheduler.add([first])
    scheduler.add([second])
    run(scheduler)
    assert len(fake_tiers.fetching) == 2
    scheduler.finish(first, FinishReason.ABORT)  # the load goes on for the second
    scheduler.kv.check()
    fake_tiers.end_all()
    assert tokens_of(run(scheduler)) == [(8, 2)]


@pytest.mark.parametrize("which", [0, 1])
def test_a_failed_fetch_costs_a_recompute_of_that_block_only(
    fake_tiers: FakeTiers, which: int
) -> None:
    scheduler = make_scheduler(fake_tiers)
    tokens = list(range(13))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    scheduler.add([make_request(tokens)])
    run(scheduler)
    fake_tiers.end_fetch(which, ok=False)
    fake_tiers.end_all()
    assert tokens_of(run(scheduler)) == [(which * BLOCK, BLOCK)]
    assert tokens_of(run(scheduler)) == [(12, 1)]
    scheduler.kv.check()


def test_a_shared_load_that_fails_gives_each_request_a_block_of_its_own(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers)
    tokens = list(range(5))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    first, second = make_request(tokens), make_request([*tokens, 99])
    scheduler.add([first])
    scheduler.add([second])
    run(scheduler)
    fake_tiers.end_fetch(ok=False)
    run(scheduler)
    assert not set(first.kv.block_table) & set(second.kv.block_table)
    scheduler.kv.check()


def test_the_front_is_computed_while_the_back_arrives(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers, mode="auto", num_blocks=16, budget=64)
    policy = scheduler.kv.transfers.policy
    assert policy is not None
    tokens = list(range(33))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    policy.rates.link_bytes_per_s["host"] = 1.0  # as fast as prefill: meet in the middle
    policy.rates.prefill_tokens_per_s = 1.0
    scheduler.add([make_request(tokens)])
    assert tokens_of(run(scheduler)) == [(0, 16)]
    assert len(fake_tiers.fetching) == 4
    fake_tiers.end_all()
    assert tokens_of(run(scheduler)) == [(32, 1)]


def test_n_outputs_share_the_blocks_of_their_prompt_until_they_write() -> None:
    scheduler = make_scheduler(num_blocks=16)
    family = [make_request(list(range(6)), max_tokens=4) for _ in range(3)]
    scheduler.add(family)
    first = run(scheduler)
    assert tokens_of(first) == [(0, 6)]
    assert len({request.kv.block_table[0] for request in family}) == 1
    second = run(scheduler)
    assert sorted(tokens_of(second)) == [(5, 1), (5, 1), (6, 1)]
    assert len(second.copies) == 2  # the last to write keeps the original
    assert len({request.kv.block_table[1] for request in family}) == 3
    while scheduler.has_requests:
        run(scheduler)
        scheduler.kv.check()
    assert scheduler.kv.pool.num_held == 0


def test_when_the_first_of_n_is_aborted_early_another_takes_over() -> None:
    scheduler = make_scheduler()
    family = [make_request(list(range(6)), max_tokens=2) for _ in range(3)]
    scheduler.add(family)
    scheduler.finish(family[0], FinishReason.ABORT)
    scheduler.finish(family[1], FinishReason.ABORT)
    while scheduler.has_requests:
        run(scheduler)
    assert family[2].finish_reason is FinishReason.LENGTH


def test_a_preempted_request_comes_back_only_when_it_can_stay(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(
        fake_tiers, num_blocks=40, max_num_seqs=16, budget=64, ahead_tokens=12
    )
    requests = [
        make_request([100 * i + j for j in range(20)], max_tokens=30, arrival_s=float(i))
        for i in range(16)
    ]
    for request in requests:
        scheduler.add([request])
    while scheduler.has_requests:
        run(scheduler)
        fake_tiers.end_all()
    metrics = scheduler.metrics
    assert metrics.preemptions > 0
    assert metrics.recomputed_tokens == 0
    assert max(request.queue.num_preemptions for request in requests) == 1
    assert metrics.refetched_bytes == 0


def test_bytes_fetched_again_after_a_second_preemption_are_counted(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers)
    request = make_request(list(range(9)), max_tokens=9)
    scheduler.add([request])
    refetched = []
    for _ in range(3):
        run(scheduler)
        scheduler._preempt_last()
        fake_tiers.end_all()
        scheduler.kv.poll()
        scheduler.kv.pool.forget_cached()
        run(scheduler)
        fake_tiers.end_all()
        scheduler.kv.poll()
        refetched.append(scheduler.metrics.refetched_bytes)
    assert refetched == [0, 2 * BLOCK, 4 * BLOCK]  # bytes_per_token is 1


def test_what_a_preempted_request_has_in_host_memory_stays_there(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers)
    fake_tiers.num_slots = 4
    request = make_request(list(range(9)), max_tokens=9)
    scheduler.add([request])
    run(scheduler)
    scheduler._preempt_last()
    scheduler.waiting.clear()
    for i in range(4):  # others write more than there is room for
        scheduler.add([make_request([50 * i + j for j in range(9)], max_tokens=1)])
        run(scheduler)
        fake_tiers.end_all()
    scheduler.kv.poll()
    scheduler.kv.pool.forget_cached()
    scheduler.waiting.append(request)
    while scheduler.has_requests:
        run(scheduler)
        fake_tiers.end_all()
    assert scheduler.metrics.recomputed_tokens == 0
    assert not fake_tiers.kept


class TimedRun:
    """Requests that come at once, run to their end on a clock: a step takes time by its tokens."""

    def __init__(self, *, rotation_s: float | None, num_slots: int = 10_000) -> None:
        self.clock = FakeClock()
        self.tiers = FakeTiers(FakeDevice(BLOCK))
        self.tiers.num_slots = num_slots
        self.scheduler = make_scheduler(
            self.tiers,
            num_blocks=40 * 8,  # 8 of the 64 requests
            max_num_seqs=64,
            budget=512,
            mixed_budget=512,
            rotation_s=rotation_s,
            clock=self.clock,
        )
        assert self.scheduler.kv.transfers.policy is not None
        self.scheduler.kv.transfers.policy.rates.link_bytes_per_s["host"] = 10_000.0
        self.first_token_s: dict[str, float] = {}
        requests = [
            make_request([1000 * i + j for j in range(120)], max_tokens=40, arrival_s=0.0)
            for i in range(64)
        ]
        for request in requests:
            self.scheduler.add([request])
        while self.scheduler.has_requests:
            plan = self.scheduler.schedule()
            self.tiers.device.compute(plan)  # type: ignore[union-attr]
            num_prefill = sum(item.num_tokens for item in plan.items if item.num_tokens > 1)
            self.clock.now_s += 0.02 + num_prefill / 8000
            run(self.scheduler, plan)
            self.tiers.end_all()
            for item in plan.items:
                if item.request.num_output_tokens == 1:
                    self.first_token_s[item.request.request_id] = self.clock.now_s
        self.metrics = self.scheduler.metrics


def test_with_rotation_every_user_has_a_first_token_soon_at_little_cost() -> None:
    served, rotated = TimedRun(rotation_s=None), TimedRun(rotation_s=0.2)
    assert served.metrics.rotations == 0
    assert rotated.metrics.rotations > 40
    last_served, last_rotated = (max(r.first_token_s.values()) for r in (served, rotated))
    assert last_rotated < last_served / 3
    assert rotated.clock.now_s < 1.15 * served.clock.now_s
    assert rotated.metrics.recomputed_tokens == 0
    assert not rotated.tiers.kept


def test_nobody_is_rotated_out_where_host_memory_has_no_room() -> None:
    run_ = TimedRun(rotation_s=0.2, num_slots=30)
    assert run_.metrics.rotations == 0
    assert len(run_.first_token_s) == 64


@pytest.mark.parametrize(("num_slots", "least"), [(200, 1), (320, 5), (800, 20), (1600, 45)])
def test_as_many_are_rotated_out_as_host_memory_has_room_for(num_slots: int, least: int) -> None:
    some = TimedRun(rotation_s=0.2, num_slots=num_slots)  # 40 a request
    assert least <= some.metrics.rotations <= num_slots // 30
    assert some.metrics.recomputed_tokens == 0
    assert not some.tiers.kept


def test_a_turn_lasts_at_least_until_its_first_token(fake_tiers: FakeTiers) -> None:
    clock = FakeClock()
    scheduler = make_scheduler(fake_tiers, max_num_seqs=1, budget=4, rotation_s=1.0, clock=clock)
    assert scheduler.kv.transfers.policy is not None
    scheduler.kv.transfers.policy.rates.link_bytes_per_s["host"] = 1000.0
    first = make_request(list(range(12)), max_tokens=9, arrival_s=0.0)
    second = make_request([50], max_tokens=2, arrival_s=0.0)
    scheduler.add([first])
    scheduler.add([second])
    for _ in range(3):  # its prefill
        clock.now_s += 10.0
        run(scheduler)
        assert scheduler.running == [first]
    run(scheduler)
    assert scheduler.running == [second]
    fake_tiers.end_all()
    clock.now_s += 0.5
    run(scheduler)  # second ends, first comes back
    while scheduler.has_requests:
        run(scheduler)
        fake_tiers.end_all()
    assert scheduler.metrics.rotations == 1
    assert scheduler.metrics.recomputed_tokens == 0


def test_prompts_that_start_alike_and_come_at_once_are_computed_once() -> None:
    scheduler = make_scheduler(num_blocks=40, budget=10)
    shared = list(range(24))
    requests = [make_request([*shared, 90 + i], max_tokens=1) for i in range(5)]
    other = make_request(list(range(50, 60)), max_tokens=1)
    for request in [*requests, other]:
        scheduler.add([request])
    num_computed = 0
    while scheduler.has_requests:
        num_computed += sum(item.num_tokens for item in run(scheduler).items)
        scheduler.kv.check()
    assert num_computed == 24 + 5 + 10
    assert scheduler.kv.pool.num_cached == 6 + 5 + 3  # with the last one of each


def test_a_prompt_goes_on_by_itself_where_the_one_it_shared_with_was_aborted() -> None:
    scheduler = make_scheduler(num_blocks=40, budget=10)
    first, second = (make_request([*range(24), 90 + i], max_tokens=1) for i in range(2))
    scheduler.add([first])
    scheduler.add([second])
    assert tokens_of(run(scheduler)) == [(0, 10)]
    assert second.status is RequestStatus.RUNNING
    scheduler.finish(first, FinishReason.ABORT)
    assert tokens_of(run(scheduler)) == [(8, 10)]  # two full blocks were there
    while scheduler.has_requests:
        run(scheduler)
    assert second.finish_reason is FinishReason.LENGTH


def test_fifty_that_want_one_prefix_share_one_load_and_go_on_together(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers, num_blocks=200, max_num_seqs=64, budget=64)
    tokens = list(range(4 * 40 + 1))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    requests = [make_request([*tokens, 500 + i]) for i in range(50)]
    for request in requests:
        scheduler.add([request])
    run(scheduler)
    assert len(fake_tiers.fetching) == 40
    assert len(scheduler.running) == 50
    assert len({tuple(request.kv.block_table) for request in requests}) == 1
    for request in requests[:3]:
        scheduler.finish(request, FinishReason.ABORT)
    scheduler.kv.check()
    fake_tiers.end_all()
    scheduler.kv.poll()
    plan = scheduler.schedule()  # 64 tokens, 2 each: as many as the step takes
    assert {item.start for item in plan.items} == {160}
    assert len(plan.items) == 32
    assert scheduler.metrics.fetched_blocks == 40


def test_what_waits_is_fetched_ahead_of_its_turn_into_blocks_without_content(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers, num_blocks=12, max_num_seqs=1)
    tokens = list(range(9))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    scheduler.add([make_request(list(range(50, 59)), max_tokens=9)])
    scheduler.add([make_request(tokens)])
    run(scheduler)
    assert len(fake_tiers.fetching) == 2
    fake_tiers.end_all()
    while len(scheduler.waiting) > 0:
        run(scheduler)
        scheduler.kv.check()
        fake_tiers.end_all()
    assert scheduler.metrics.fetched_blocks == 2
    assert scheduler.running[0].kv.num_computed_tokens == 9  # at once, with its first step


def test_no_more_is_staged_than_host_memory_can_hold_beside_the_rest(
    fake_tiers: FakeTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged: list[bytes] = []
    monkeypatch.setattr(fake_tiers, "most_staged", lambda: 5)
    monkeypatch.setattr(fake_tiers, "stage", staged.append)
    scheduler = make_scheduler(fake_tiers, max_num_seqs=1)
    scheduler.add([make_request([7, 7, 7], max_tokens=20)])
    waiting = [make_request([seed] * 9) for seed in (10, 20, 30)]
    for request in waiting:
        scheduler.kv.prefixes.extend(request)
        fake_tiers.stored.update(dict.fromkeys(request.kv.block_hashes, "disk"))
        scheduler.add([request])
    run(scheduler)
    # Three blocks each: those of the second are begun, as five are left for the first.
    assert staged == waiting[0].kv.block_hashes + waiting[1].kv.block_hashes


def test_nothing_is_fetched_ahead_into_blocks_that_running_requests_need(
    fake_tiers: FakeTiers,
) -> None:
    scheduler = make_scheduler(fake_tiers, num_blocks=6, max_num_seqs=1, budget=4)
    tokens = list(range(9))
    fill_host_then_forget_device(scheduler, fake_tiers, tokens)
    scheduler.add([make_request(list(range(50, 66)), max_tokens=4)])  # 5 blocks, 4 tokens a step
    scheduler.add([make_request(tokens)])
    run(scheduler)
    assert len(fake_tiers.fetching) == 1


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("with_tiers", [False, True])
def test_random_loads_with_aborts_and_faults_end_with_every_block_back(
    seed: int, with_tiers: bool, fake_tiers: FakeTiers
) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        fake_tiers if with_tiers else None,
        num_blocks=rng.randint(6, 14),
        max_num_seqs=rng.randint(1, 6),
        budget=rng.randint(1, 20),
        mode=rng.choice(["fetch", "auto", "recompute"]) if with_tiers else "auto",
    )
    prompts = [[rng.randrange(3) for _ in range(rng.randint(1, 16))] for _ in range(6)]
    requests: list[Request] = []
    for _ in range(rng.randint(5, 25)):
        prompt = rng.choice(prompts) + [rng.randrange(3) for _ in range(rng.randint(0, 3))]
        n = rng.choice([1, 1, 1, 3])
        order = {"priority": rng.randint(0, 1), "arrival_s": rng.random()}
        family = [make_request(prompt, max_tokens=rng.randint(1, 5), **order) for _ in range(n)]
        requests += family
        scheduler.add(family)
    for step in range(3000):
        run(scheduler)
        scheduler.kv.check()
        if not scheduler.has_requests:
            break
        fake_tiers.has_room = rng.random() < 0.8
        for key in list(fake_tiers.spilling):
            if rng.random() < 0.4:
                fake_tiers.end_spill(key)
        for index in reversed(range(len(fake_tiers.fetching))):
            if rng.random() < 0.4:
                fake_tiers.end_fetch(index, ok=rng.random() < 0.7)
        if rng.random() < 0.05:
            scheduler.finish(rng.choice(requests), FinishReason.ABORT)
        if step == 50:
            fake_tiers.stored.clear()  # the tier is gone
    assert all(request.is_finished for request in requests)
    fake_tiers.end_all()
    scheduler.kv.poll()
    scheduler.kv.check()
    assert scheduler.kv.pool.num_held == 0
