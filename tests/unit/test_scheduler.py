"""The scheduler with its KV cache, over tiers without bytes."""

import itertools
import random

import pytest
from fakes import FakeTiers

from hotset.engine.scheduler import Scheduler
from hotset.memory.block_pool import BlockPool
from hotset.memory.kv_cache import KVCache, block_hash, root_hash
from hotset.memory.policy import PrefixPolicy, Rates
from hotset.metrics import Metrics
from hotset.request import FinishReason, Request, RequestStatus, SamplingParams, StepPlan

BLOCK = 4


def make_scheduler(
    tiers: FakeTiers | None = None,
    *,
    num_blocks: int = 8,
    max_num_seqs: int = 8,
    budget: int = 16,
    mixed_budget: int = 16,
    prefix_caching: bool = True,
    mode: str = "fetch",
) -> Scheduler:
    rates = Rates(1.0, {"host": 1.0, "disk": 1.0})
    kv = KVCache(
        BlockPool(num_blocks),
        block_size=BLOCK,
        fingerprint="model",
        metrics=Metrics(),
        tiers=tiers,
        policy=None if tiers is None else PrefixPolicy(rates, bytes_per_token=1, mode=mode),
        prefix_caching=prefix_caching,
    )
    return Scheduler(
        kv,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_mixed_prefill_tokens=mixed_budget,
    )


_ids = itertools.count()


def make_request(tokens: list[int], *, max_tokens: int = 4, **fields: object) -> Request:
    return Request(
        request_id=f"r{next(_ids)}",
        prompt_len=len(tokens),
        token_ids=list(tokens),
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=len(tokens) + max_tokens,
        **fields,  # type: ignore[arg-type]
    )


def run(scheduler: Scheduler, plan: StepPlan | None = None) -> StepPlan:
    """One step: schedule, 'compute', append a token to those that sample, finish at the limit."""
    scheduler.kv.poll()
    plan = plan or scheduler.schedule()
    sampling = [item.request for item in plan.items if item.samples]
    scheduler.commit(plan)
    for request in sampling:
        request.token_ids.append(100 + request.num_tokens)
        if request.num_tokens >= request.max_total_tokens:
            scheduler.finish(request, FinishReason.LENGTH)
    return plan


def tokens_of(plan: StepPlan) -> list[tuple[int, int]]:
    return [(item.start, item.num_tokens) for item in plan.items]


def test_prompts_take_a_smaller_share_of_a_step_that_also_decodes() -> None:
    scheduler = make_scheduler(budget=16, mixed_budget=3)
    scheduler.add([make_request(list(range(5)))])
    scheduler.add([make_request(list(range(50, 58)))])
    assert tokens_of(run(scheduler)) == [(0, 5), (0, 8)]  # nobody decodes yet
    scheduler.add([make_request(list(range(20, 24)))])
    assert tokens_of(run(scheduler)) == [(5, 1), (8, 1), (0, 3)]
    assert tokens_of(run(scheduler)) == [(6, 1), (9, 1), (3, 1)]


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
    scheduler = make_scheduler(num_blocks=5, prefix_caching=False)
    old = make_request(list(range(7)), max_tokens=9, arrival_s=1.0)
    young = make_request(list(range(50, 57)), max_tokens=9, arrival_s=2.0)
    scheduler.add([old])
    scheduler.add([young])
    while young.num_preemptions == 0:
        run(scheduler)
        scheduler.kv.check()
    assert old.num_preemptions == 0 and young.status is RequestStatus.WAITING
    while scheduler.has_requests:
        run(scheduler)
        scheduler.kv.check()
    assert scheduler.kv.metrics.recomputed_tokens > 0
    assert young.num_output_tokens == 9


def test_a_preempted_request_comes_back_with_its_partial_block(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers, num_blocks=5)
    old = make_request(list(range(7)), max_tokens=9, arrival_s=1.0)
    young = make_request(list(range(50, 57)), max_tokens=9, arrival_s=2.0)
    scheduler.add([old])
    scheduler.add([young])
    while scheduler.has_requests:
        run(scheduler)
        scheduler.kv.check()
        fake_tiers.end_all()
    assert young.num_preemptions > 0
    assert scheduler.kv.metrics.recomputed_tokens == 0
    assert old.num_output_tokens == young.num_output_tokens == 9


def test_a_full_block_is_spilled_once_as_soon_as_it_is_full(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers)
    scheduler.add([make_request(list(range(9)), max_tokens=2)])
    run(scheduler)
    assert len(fake_tiers.spilling) == 2
    fake_tiers.end_all()
    scheduler.kv.poll()
    scheduler.add([make_request(list(range(9)), max_tokens=2)])
    run(scheduler)
    assert not fake_tiers.spilling


def fill_host_then_forget_device(scheduler: Scheduler, tiers: FakeTiers, tokens: list[int]) -> None:
    scheduler.add([make_request(tokens, max_tokens=1)])
    while scheduler.has_requests:
        run(scheduler)
    tiers.end_all()
    scheduler.kv.poll()
    scheduler.kv.pool.forget_cached()


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
    assert scheduler.kv.metrics.cached_tokens["host"] == 8


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
    assert not set(first.block_table) & set(second.block_table)
    scheduler.kv.check()


def test_the_front_is_computed_while_the_back_arrives(fake_tiers: FakeTiers) -> None:
    scheduler = make_scheduler(fake_tiers, mode="auto", num_blocks=16, budget=64)
    policy = scheduler.kv._policy
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
    assert len({request.block_table[0] for request in family}) == 1
    second = run(scheduler)
    assert sorted(tokens_of(second)) == [(5, 1), (5, 1), (6, 1)]
    assert len(second.copies) == 2  # the last to write keeps the original
    assert len({request.block_table[1] for request in family}) == 3
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
