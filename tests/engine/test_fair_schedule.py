"""How prompts share steps: short ones soon, equal ones in order, long ones always."""

import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedulers import make_request, make_scheduler, run, tokens_of

from hotset.engine.scheduler import Scheduler
from hotset.engine.step import Step
from hotset.engine.step_cost import StepCost, context_cost
from hotset.request import FinishReason
from hotset.sequence import Request, RequestStatus

_tokens = itertools.count(1000)
_arrivals = itertools.count()


def prompt(length: int, *, max_tokens: int = 1, **fields: object) -> Request:
    """A request that shares nothing with any other."""
    tokens = [next(_tokens) for _ in range(length)]
    fields.setdefault("arrival_s", float(next(_arrivals)))
    return make_request(tokens, max_tokens=max_tokens, **fields)


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add([request])


def steps_to_first_token(scheduler: Scheduler, *requests: Request, most: int = 1000) -> list[int]:
    """Run until all have a token; in how many steps each has its first."""
    steps: dict[Request, int] = {}
    for step in range(1, most + 1):
        run(scheduler)
        for request in requests:
            if request.num_output_tokens:
                steps.setdefault(request, step)
        if len(steps) == len(requests):
            return [steps[request] for request in requests]
    raise AssertionError(f"no first token within {most} steps")


def share(plan: Step, request: Request) -> int:
    return sum(item.num_tokens for item in plan.items if item.request is request)


@pytest.mark.parametrize("num_long", [1, 8])
@pytest.mark.parametrize("with_stream", [False, True])
def test_short_prompts_do_not_wait_for_long_ones(num_long: int, with_stream: bool) -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=64, mixed_budget=32)
    if with_stream:
        add(scheduler, prompt(4, max_tokens=500))
        run(scheduler)
    long = [prompt(600) for _ in range(num_long)]
    add(scheduler, *long)
    for _ in range(3):
        run(scheduler)
    short = [prompt(4) for _ in range(5)]
    add(scheduler, *short)
    # 20 tokens, of which three quarters of a step compute 24 beside a stream.
    assert steps_to_first_token(scheduler, *short) == [1] * 5
    assert not any(request.num_output_tokens for request in long)


def test_short_prompts_do_not_wait_once_long_ones_are_overdue() -> None:
    """However many long prompts have waited for however long."""
    scheduler = make_scheduler(num_blocks=8000, max_num_seqs=64, budget=64, mixed_budget=64)
    add(scheduler, *(prompt(600) for _ in range(40)))
    for _ in range(120):  # 7,680 tokens: each was due after 4,800
        run(scheduler)
    short = prompt(12)
    add(scheduler, short)
    assert steps_to_first_token(scheduler, short) == [1]


def test_a_long_prompt_has_a_part_of_every_step() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=32, mixed_budget=32)
    long = prompt(600)
    add(scheduler, long)
    run(scheduler)
    for _ in range(10):
        add(scheduler, *(prompt(8) for _ in range(4)))
        assert share(run(scheduler), long) >= 8


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 200),
    short_length=st.integers(1, 40),
    each_step=st.integers(1, 4),
    budget=st.integers(4, 64),
)
@example(length=40, short_length=7, each_step=3, budget=8)  # decodes leave 7: a quarter is 2
@example(length=101, short_length=7, each_step=3, budget=8)
@example(length=192, short_length=13, each_step=4, budget=8)
def test_a_long_prompt_among_endless_short_ones_has_its_first_token_within_a_bound(
    length: int, short_length: int, each_step: int, budget: int
) -> None:
    scheduler = make_scheduler(
        num_blocks=20_000, max_num_seqs=10_000, budget=budget, mixed_budget=budget
    )
    long = prompt(length)
    add(scheduler, prompt(short_length))
    add(scheduler, long)
    short = []
    for step in itertools.count(1):
        short += [prompt(short_length) for _ in range(each_step)]
        add(scheduler, *short[-each_step:])
        run(scheduler)
        if long.num_output_tokens:
            break
        # The one before it, and then a quarter of each step.
        assert step <= (length + short_length) / max(1, budget // 4) + 4
    for _ in range(20_000):
        if not scheduler.has_requests:
            break
        run(scheduler)
    assert all(request.num_output_tokens == 1 for request in short)


def test_equal_prompts_are_computed_one_after_the_other() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=50, mixed_budget=50)
    requests = [prompt(40) for _ in range(20)]
    add(scheduler, *requests)
    seen: list[Request] = []
    while scheduler.has_requests:
        plan = run(scheduler)
        assert sum(item.num_tokens for item in plan.items) == 50 or not scheduler.has_requests
        assert len(plan.items) <= 3  # the end of one, a whole one, the start of another
        seen += [item.request for item in plan.items if item.request not in seen]
    assert seen == requests


def test_one_that_is_a_little_shorter_does_not_overtake() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=64, mixed_budget=64)
    first, second = prompt(600), prompt(590)
    add(scheduler, first)
    for _ in range(2):
        run(scheduler)
    add(scheduler, second)
    assert steps_to_first_token(scheduler, first, second) == [8, 17]


def test_a_tenant_with_many_prompts_delays_its_own() -> None:
    scheduler = make_scheduler(num_blocks=8000, max_num_seqs=64, budget=64, mixed_budget=64)
    flood = [prompt(320, tenant="flood") for _ in range(10)]
    add(scheduler, *flood)
    run(scheduler)
    other = prompt(320, tenant="other")
    add(scheduler, other)
    *_, last = steps_to_first_token(scheduler, other)
    assert last <= 3 * 320 / 64
    assert sum(request.is_finished for request in flood) <= 2


def test_many_tenants_with_equal_prompts_are_served_in_order() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=50, mixed_budget=50)
    requests = [prompt(40, tenant=f"tenant {i}") for i in range(20)]
    add(scheduler, *requests)
    steps = steps_to_first_token(scheduler, *requests)
    assert steps == sorted(steps) and steps[0] == 1 and steps[9] == 8


def test_a_lower_priority_gets_no_part_of_what_a_higher_one_can_take() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=32, mixed_budget=32)
    batch = prompt(300, priority=1)
    add(scheduler, batch)
    run(scheduler)
    chat = prompt(320)
    add(scheduler, chat)
    run(scheduler)  # was planned in part before it was let in
    for _ in range(9):
        assert share(run(scheduler), chat) == 32


@pytest.mark.parametrize("num_computed", [10, 12])  # within a block, and at its end
def test_who_computes_a_prefix_gets_the_share_of_those_that_wait_for_it(num_computed: int) -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=32, mixed_budget=32)
    shared = list(range(80))
    first = make_request([*shared, *range(500, 700)], max_tokens=1, arrival_s=1.0)
    other = prompt(600, arrival_s=0.0)
    add(scheduler, first)
    scheduler.max_num_batched_tokens = num_computed
    run(scheduler)
    scheduler.max_num_batched_tokens = 0
    add(scheduler, other)
    run(scheduler)  # is let in
    scheduler.max_num_batched_tokens = 32
    short = make_request([*shared, 900], max_tokens=1, arrival_s=2.0)
    add(scheduler, short)
    computed = num_computed
    for _ in range(4):
        plan = run(scheduler)
        # The oldest has its quarter, and the prefix the rest.
        assert 8 <= share(plan, other) <= 12
        computed += share(plan, first) + share(plan, short)
        if short.is_finished:
            break
    assert short.is_finished and not first.is_finished
    while scheduler.has_requests:
        computed += sum(i.num_tokens for i in run(scheduler).items if i.request is not other)
    assert computed == 80 + 1 + 200  # the prefix once


def test_outputs_that_wait_for_their_prompt_are_served_as_it_is() -> None:
    scheduler = make_scheduler(num_blocks=4000, max_num_seqs=64, budget=32, mixed_budget=32)
    add(scheduler, prompt(600))
    run(scheduler)
    tokens = list(range(9))
    outputs = [make_request(tokens, max_tokens=2, arrival_s=1e6) for _ in range(4)]
    scheduler.add(outputs)
    assert max(steps_to_first_token(scheduler, *outputs)) <= 2


def test_much_shorter_ones_pass_one_that_has_no_room_yet_up_to_half_of_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=64, budget=64, mixed_budget=64)
    running = prompt(60, max_tokens=40)  # 25 blocks in the end
    add(scheduler, running)
    run(scheduler)
    long = prompt(80, max_tokens=4)  # 21
    half, short = prompt(40), [prompt(4) for _ in range(20)]
    add(scheduler, long, half, *short)
    passed = 0
    while not running.is_finished:
        run(scheduler)
        scheduler.kv.check()
        passed = sum(request.num_output_tokens > 0 for request in short)
        assert not long.num_output_tokens
    assert passed == 10  # 40 of its 80 tokens
    assert not half.num_output_tokens  # not that much shorter
    assert steps_to_first_token(scheduler, long, most=3)
    while scheduler.has_requests:
        run(scheduler)


def test_nobody_passes_one_that_was_preempted_in_its_answer() -> None:
    scheduler = make_scheduler(
        num_blocks=40, max_num_seqs=64, budget=64, mixed_budget=64, ahead_tokens=1
    )
    running, preempted = prompt(60, max_tokens=40), prompt(40, max_tokens=40)
    add(scheduler, running, preempted)
    for _ in range(40):
        if preempted.queue.num_preemptions == 0:
            run(scheduler)
    assert preempted.num_output_tokens and preempted.status is RequestStatus.WAITING
    short = prompt(4)
    add(scheduler, short)
    while not running.is_finished:
        run(scheduler)
        assert not short.num_output_tokens


def test_trimming_leaves_the_short_and_the_sure_part_of_the_oldest() -> None:
    scheduler = make_scheduler(
        num_blocks=4000, max_num_seqs=4, budget=64, mixed_budget=64, row_tile=16
    )
    oldest, middle, short = prompt(60), prompt(62), prompt(5)
    add(scheduler, oldest)
    run(scheduler, scheduler.schedule())
    add(scheduler, prompt(4, max_tokens=90), middle, short, *(prompt(4) for _ in range(4)))
    plan = run(scheduler)
    assert sum(item.num_tokens for item in plan.items) % 16 == 0
    assert share(plan, short) == 5


def cost_of(base_s: float, token_s: float) -> StepCost:
    return StepCost([(n, base_s + n * token_s) for n in (32, 256)])


@pytest.mark.parametrize(
    ("base_s", "token_s", "alone", "beside"),
    [
        (0.02, 1e-5, 256, 256),  # a GPU: the bound in tokens is lower
        (0.02, 0.002, 224, 96),  # 0.5 s and 0.25 s, in multiples of 32
        (0.02, 0.1, 128, 32),  # and at least so many
        (20.0, 0.1, 192, 192),  # all of it is slow: prompts get as long as the rest of the step
    ],
)
def test_prompts_add_a_bounded_time_to_a_step(
    base_s: float, token_s: float, alone: int, beside: int
) -> None:
    scheduler = make_scheduler(
        num_blocks=4000,
        budget=256,
        mixed_budget=257,
        step_cost=cost_of(base_s, token_s),
    )
    add(scheduler, prompt(600))
    assert tokens_of(run(scheduler)) == [(0, alone)]
    scheduler = make_scheduler(
        num_blocks=4000,
        budget=258,
        mixed_budget=257,
        step_cost=cost_of(base_s, token_s),
    )
    add(scheduler, prompt(2, max_tokens=90))
    run(scheduler)
    long = prompt(600)
    add(scheduler, long)
    assert share(run(scheduler), long) == beside


@pytest.mark.parametrize(("base_s", "token_s"), [(0.01, 1e-4), (0.03, 0.001), (0.3, 0.005)])
@pytest.mark.parametrize("held_up", [0, 32, 64, 256, 1024])
def test_a_step_that_was_held_up_does_not_bound_prompts_for_good(
    base_s: float, token_s: float, held_up: int
) -> None:
    cost = cost_of(base_s, token_s)

    def step(num_tokens: int) -> None:
        cost.observe(num_tokens, base_s + num_tokens * token_s)

    def most_now() -> int:
        return min(1024, cost.most_tokens(0.25, least=32))

    for _ in range(60):
        step(most_now())
        step(0)
        step(0)
    usual = most_now()
    cost.observe(held_up, 20.0)
    for _ in range(100):
        step(most_now())  # prompts wait all the time: all steps have as many tokens
    assert usual / 4 < most_now() < 4 * usual


@pytest.mark.parametrize(("token_s", "most"), [(1e-5, 511), (4e-4, 224), (2e-3, 96)])
def test_bursts_take_less_time_but_no_fewer_tokens_than_beside_decodes(
    token_s: float, most: int
) -> None:
    scheduler = make_scheduler(
        num_blocks=4000,
        budget=512,
        mixed_budget=130,
        bursts=True,
        step_cost=cost_of(0.005, token_s),
    )
    add(scheduler, prompt(2, max_tokens=90))
    run(scheduler)
    add(scheduler, *(prompt(300) for _ in range(3)))
    plan = run(scheduler)
    assert sum(item.num_tokens for item in plan.items if item.num_tokens > 1) == most


def test_the_cost_of_a_token_is_not_that_of_a_step() -> None:
    """Steps that read all experts take a second, whatever they compute: chunks stay large."""
    cost = cost_of(0.03, 0.001)
    for _ in range(200):
        num_tokens = min(256, cost.most_tokens(0.25, least=32))
        cost.observe(num_tokens, 1.0 + num_tokens * 0.001)
        cost.observe(0, 1.0)
    assert cost.base_s == pytest.approx(1.0, rel=0.05)
    assert cost.token_s == pytest.approx(0.001, rel=0.2)


def test_the_cost_of_a_token_follows_a_machine_that_others_use_too() -> None:
    cost = cost_of(0.03, 0.001)
    assert cost.most_tokens(0.25, least=32) == 224
    for _ in range(60):
        cost.observe(64, 0.1 + 64 * 0.004)
        cost.observe(0, 0.1)
    assert cost.most_tokens(0.25, least=32) == 32
    for _ in range(60):
        cost.observe(32, 0.03 + 32 * 0.001)
        cost.observe(0, 0.03)
    assert cost.most_tokens(0.25, least=32) >= 192


def test_what_attention_takes_is_learned_from_long_prompts_and_kept_while_all_are_short() -> None:
    cost = context_cost()
    assert (cost.base, cost.slope) == (0.0, 0.0)

    def seconds(context: float) -> float:
        return 2e-5 * (1 + context / 12_500)

    for context in range(0, 100_000, 1000):
        cost.observe(context, seconds(context))
    rng = random.Random(0)
    for _ in range(500):
        context = rng.uniform(500, 1500)
        cost.observe(context, seconds(context) * rng.uniform(0.8, 1.25))
    assert cost.base + 50_000 * cost.slope == pytest.approx(seconds(50_000), rel=0.3)


@given(st.lists(st.tuples(st.integers(0, 4096), st.floats(0, 100)), max_size=60))
def test_whatever_is_seen_prompts_get_tokens(steps: list[tuple[int, float]]) -> None:
    cost = cost_of(0.02, 0.001)
    for num_tokens, seconds in steps:
        cost.observe(num_tokens, seconds)
        assert cost.most_tokens(0.25, least=32) >= 32
        assert cost.base_s >= 0.0 and cost.token_s >= 0.0


def test_a_prompt_that_ends_while_others_wait_for_its_tokens_leaves_them_to_another() -> None:
    scheduler = make_scheduler(num_blocks=400, budget=10, mixed_budget=10)
    requests = [make_request([*range(24), 90 + i], max_tokens=1) for i in range(3)]
    add(scheduler, *requests)
    run(scheduler)
    scheduler.finish(requests[0], FinishReason.ABORT)
    while scheduler.has_requests:
        run(scheduler)
        scheduler.kv.check()
    assert all(request.is_finished for request in requests)
