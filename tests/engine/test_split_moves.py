"""The boundary between experts and KV moves while requests run, and nobody notices."""

import random
from typing import Any

import pytest
from engines import reference
from fakes import FakeClock
from test_memory_split import FAMILY, engine, slots

from hotset.cost.split_policy import SplitPolicy
from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.experts import hosting
from hotset.request import FinishReason, SamplingParams
from hotset.units import GIB

OPTIONS: list[dict[str, Any]] = [
    {"expert_plan": "cache", "expert_prefetch": 2, "host_gib": 0.001},
    {"expert_plan": "auto", "expert_eviction": "lru"},
]


def check(made: Engine) -> None:
    """The boundary is in one place, and nobody is beyond it."""
    experts, mover = made.experts, made._mover
    assert experts is not None and mover is not None
    made.kv.check()
    for layer in experts.layers:
        assert layer.table.num_active == experts.num_slots
        layer.table.check()
    pool, region = made.kv.pool, mover._region
    assert region.fewest_slots <= experts.num_slots <= region.most_slots
    assert pool.first == region.first_block(experts.num_slots)
    assert all(
        block >= pool.first for one in made.scheduler.running for block in one.kv.block_table
    )
    assert made.metrics.split_kv_bytes == pool.num_usable * made.sizes.block_bytes
    assert made.metrics.split_expert_bytes == experts.device_bytes


def serve_with_moves(made: Engine, seed: int) -> tuple[list[list[int]], list[list[int]], set[int]]:
    """Serve 60 requests, move and abort at random; prompts and answers, and numbers of slots."""
    rng = random.Random(seed)
    experts, mover = made.experts, made._mover
    assert experts is not None and mover is not None
    region, seen = mover._region, set()
    starts = [[rng.randrange(3, 256) for _ in range(20)] for _ in range(5)]
    pending = [
        rng.choice(starts) + [rng.randrange(3, 256) for _ in range(rng.randint(1, 20))]
        for _ in range(60)
    ]
    prompts: dict[str, list[int]] = {}
    tokens: dict[str, list[int]] = {}
    done: set[str] = set()
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    steps = 0
    while pending or made.has_work:
        steps += 1
        is_busy = steps % 40 < 10
        for _ in range(rng.randint(0, 4 if is_busy else 1)):
            if pending and (is_busy or not made.has_work):
                name = made.add_request(pending[-1], params)
                prompts[name], tokens[name] = pending.pop(), []
        if rng.random() < 0.3:
            mover.aim(rng.randint(region.fewest_slots, region.most_slots))
        for output in made.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is FinishReason.LENGTH:
                done.add(output.request_id)
        seen.add(experts.num_slots)
        check(made)
        if rng.random() < 0.05:
            made.abort(rng.choice(sorted(prompts)))
    # With nobody there it can go to either end.
    while made.has_transfers:
        made.step()
    for end in (region.fewest_slots, region.most_slots):
        mover.aim(end)
        for _ in range(region.most_slots + 50):
            made.step()
        check(made)
        assert experts.num_slots == end and made.kv.pool.num_held == 0
    assert len(done) > 40
    return [prompts[name] for name in done], [tokens[name] for name in done], seen


@pytest.mark.parametrize("shares_memory", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_are_those_of_resident_experts_while_the_boundary_moves(
    options: dict[str, Any], overlap: bool, shares_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SplitPolicy, "choose", lambda *args: None)
    monkeypatch.setattr(hosting, "can_pack", lambda: not shares_memory)
    sizes = slots(plan=options["expert_plan"])
    hot_gib = (sizes(1) + 6 * slots(plan="cache")(1)) / GIB  # seven slots, no KV
    with engine(
        hot_gib=hot_gib, move_split=True, expected_users=8, overlap=overlap, **options
    ) as made:
        assert made.experts is not None and (made.experts.memory is not None) == shares_memory
        made.scheduler.ahead_tokens = 1  # so that many are preempted
        prompts, answers, seen = serve_with_moves(made, seed=overlap)
        assert len(seen) > 3 and made.metrics.preemptions > 0
    assert answers == reference(FAMILY, prompts)
    # The model holds none of the engine's memory any more.
    hosted = [layer.experts.hosted for layer in made.experts.layers]
    assert all(each is not None and each.buffer is None for each in hosted)


def test_nobody_is_preempted_for_slots_which_wait_for_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SplitPolicy, "choose", lambda *args: None)
    hot_gib = slots(plan="cache")(7) / GIB
    with engine(hot_gib=hot_gib, move_split=True, expert_plan="cache", expected_users=8) as made:
        mover, experts = made._mover, made.experts
        assert mover is not None and experts is not None
        most = mover._region.most_slots
        for user in range(7):
            made.add_request([9 + user] * 8, SamplingParams(max_tokens=24 + user, ignore_eos=True))
        made.step()
        mover.aim(most)
        while made.has_work:
            made.step()
            check(made)
            num_running = len(made.scheduler.running)
            assert experts.num_slots < most or num_running < 4
        for _ in range(most):
            made.step()
        assert experts.num_slots == most and made.metrics.preemptions == 0


def test_kv_grows_for_a_crowd_and_experts_for_one_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotset.cost.split_policy._LEAST_GAIN", 0.001)  # such a model gains little
    clock = FakeClock()
    with engine(hot_gib=slots(plan="cache")(5) / GIB, move_split=True, expert_plan="cache") as made:
        mover, experts = made._mover, made.experts
        assert mover is not None and experts is not None
        mover._clock = clock
        sizes = []
        for phase, users in enumerate((1, 16, 1)):
            params = SamplingParams(max_tokens=88, ignore_eos=True)
            # All different: a block that is found and held keeps a slot from being taken in use.
            prompts = [[7 + 17 * phase + user] * 8 for user in range(users)]
            names = [made.add_request(prompt, params) for prompt in prompts]
            for _ in range(80):
                clock.now_s += 1
                made.step()
                check(made)
            sizes.append(experts.num_slots)
            for name in names:
                made.abort(name)
        assert sizes[1] < sizes[0] == sizes[2]
        assert made.metrics.split_moves >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "move_split is True, which does nothing without memory to split"),
        ({"hot_gib": 0.001, "expert_slots": 3}, "move_split is True, which does nothing without"),
        ({"hot_gib": 1.0}, "move_split does nothing while all experts are on the device"),
        ({"hot_gib": 0.001, "expert_plan": "stream"}, "expert_plan stream needs the same number"),
        ({"hot_gib": 0.001, "expert_cpu": "auto"}, "expert_cpu auto needs the same number"),
        ({"hot_gib": 0.0007, "expert_host_gib": 0.0005}, "leaves experts on disk, with which"),
        ({"hot_gib": slots(plan="cache")(2) / GIB, "expert_plan": "cache"}, "has no other split"),
    ],
)
def test_a_split_that_cannot_move_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message), engine(move_split=True, **options):
        pass


def test_a_dense_model_has_no_split_to_move() -> None:
    with (
        pytest.raises(ConfigError, match="move_split is True, but LlamaForCausalLM has no experts"),
        engine("llama", hot_gib=0.01, move_split=True),
    ):
        pass
