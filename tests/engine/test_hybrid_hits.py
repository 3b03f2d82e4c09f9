"""States that were kept: a hit has the logits of a cold run, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import run
from hybrid_prompts import KINDS, ROOM, TOKENS, found, make_prompt, note_logits
from tiny_models import HYBRID_FAMILIES

from hotset.attention.state_tables import GRID
from hotset.engine.engine import Engine
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_hit_on_the_grid_has_the_logits_of_a_cold_run_bit_for_bit(
    family: str, dtype: torch.dtype, make_engine: MakeEngine
) -> None:
    engine = make_engine(
        family, **ROOM, model_dtype=dtype, max_num_batched_tokens=GRID, block_size=GRID
    )
    prompt = make_prompt(150)
    cold = note_logits(engine)
    answer = run(engine, [prompt], max_tokens=TOKENS)
    hot = note_logits(engine)
    assert run(engine, [prompt], max_tokens=TOKENS) == answer
    assert found(engine) == 2 * GRID
    assert len(cold) >= len(hot) == TOKENS
    for one, other in zip(cold[:TOKENS], hot, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", KINDS)
def test_a_state_that_a_step_keeps_on_its_way_changes_no_bit(
    family: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompt(150)
    both = []
    for keeps in (True, False):
        engine = make_engine(family, **ROOM)
        assert engine.kv.states is not None
        if not keeps:
            monkeypatch.setattr(engine.kv.states, "_want", lambda *_: None)
        both.append(note_logits(engine))
        run(engine, [prompt], max_tokens=4)
        assert engine.kv.states.slots.pool.num_cached == 1 + keeps  # with that of its end
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


@pytest.mark.parametrize("family", KINDS)
def test_without_that_state_the_answer_is_another(family: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family, **ROOM, max_num_batched_tokens=GRID, block_size=GRID)
    prompt = make_prompt(131)
    cold = note_logits(engine)
    run(engine, [prompt], max_tokens=1)
    arena: Any = engine.executor.runner._states  # type: ignore[attr-defined]
    for slots in (*arena.columns.values(), *arena.recurrent.values()):
        slots[2:] = slots[2:].roll(1, 1)  # of other channels and heads
    hot = note_logits(engine)
    run(engine, [prompt], max_tokens=1)
    assert found(engine) == 2 * GRID
    assert not torch.allclose(cold[0], hot[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("host_blocks", [0, 600])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_the_next_turn_goes_on_from_the_end_of_the_last(
    family: str, overlap: bool, host_blocks: int, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **ROOM, overlap=overlap, host_blocks=host_blocks)
    cold = make_engine(family, **ROOM, prefix_caching=False)
    turn, num_computed = make_prompt(90), 0
    for seed in range(3):
        before = found(engine)
        [answer] = run(engine, [turn], max_tokens=TOKENS)
        assert [answer] == run(cold, [turn], max_tokens=TOKENS)
        assert found(engine) - before == num_computed
        # The last token was chosen and not computed.
        num_computed = len(turn) + len(answer) - 1
        turn = [*turn, *answer, *make_prompt(9, seed=seed + 1)]
    assert found(cold) == 0


def test_an_end_that_the_host_learns_of_late_is_found_behind_its_last_token(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine("qwen3_5_text", **ROOM, overlap=True)
    cold = make_engine("qwen3_5_text", **ROOM, prefix_caching=False)
    prompt = make_prompt(70)
    [answer] = run(cold, [prompt], max_tokens=TOKENS)
    stop = next(token for i, token in enumerate(answer) if i >= 3 and token not in answer[:i])
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, stop_token_ids=(stop,))
    engine.add_request(prompt, params)
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    ended = answer[: answer.index(stop) + 1]
    assert tokens in (ended, ended[:-1])
    turn = [*prompt, *ended, *make_prompt(7, seed=5)]
    assert run(engine, [turn], max_tokens=TOKENS) == run(cold, [turn], max_tokens=TOKENS)
    assert found(engine) == len(prompt) + len(ended)  # one step had gone on


@pytest.mark.parametrize("family", KINDS)
def test_a_shared_beginning_is_found_from_the_third_request_on(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **ROOM, block_size=GRID)
    cold = make_engine(family, **ROOM, block_size=GRID, prefix_caching=False)
    shared = make_prompt(2 * GRID + 10)
    counts = []
    for seed in range(3):
        prompt = shared + make_prompt(GRID, seed=seed + 1)
        assert run(engine, [prompt], max_tokens=4) == run(cold, [prompt], max_tokens=4)
        counts.append(found(engine))
    assert counts == [0, 0, 2 * GRID]


@pytest.mark.parametrize("max_num_batched_tokens", [GRID, 512])
@pytest.mark.parametrize("family", KINDS)
def test_of_requests_that_begin_alike_at_once_one_computes_what_they_share(
    family: str, max_num_batched_tokens: int, make_engine: MakeEngine
) -> None:
    sizes = {**ROOM, "block_size": GRID, "max_num_batched_tokens": max_num_batched_tokens}
    engine = make_engine(family, **sizes)
    cold = make_engine(family, **ROOM, block_size=GRID, prefix_caching=False)
    shared = make_prompt(2 * GRID + 10)
    prompts = [shared + make_prompt(20 + seed, seed=seed + 1) for seed in range(3)]
    other = make_prompt(30, seed=9)
    requests = [engine.add_request(each, GREEDY) for each in [*prompts, other]]
    outputs: dict[str, list[int]] = {one: [] for one in requests}
    started = None
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        engine.kv.check()
        started = started or [one.request_id for one in engine.scheduler.running]
    assert started == [requests[0], requests[3]]  # nobody waits behind those that wait
    assert list(outputs.values()) == run(cold, [*prompts, other], max_tokens=TOKENS)
    assert found(engine) == 2 * 2 * GRID


def test_a_state_that_a_request_has_waited_for_does_not_go_first(make_engine: MakeEngine) -> None:
    engine = make_engine("bamba", **ROOM, block_size=GRID)
    assert engine.kv.states is not None
    run(engine, [make_prompt(100, seed=5)], max_tokens=4)
    shared = make_prompt(2 * GRID + 10)
    run(engine, [shared + make_prompt(70 + seed, seed=seed + 1) for seed in range(2)])
    assert found(engine) == 2 * GRID
    pool, [used] = engine.kv.states.slots.pool, engine.kv.states._used
    pool.allocate(pool.num_free)
    pool.allocate(1)  # the first to go
    assert pool.lookup(used) is not None


@pytest.mark.parametrize("how", ["aborted", "preempted", "without a slot"])
def test_what_a_request_waits_for_need_not_come(
    how: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("bamba", **ROOM, block_size=GRID, max_num_batched_tokens=GRID)
    cold = make_engine("bamba", **ROOM, block_size=GRID, prefix_caching=False)
    shared = make_prompt(2 * GRID + 10)
    prompts = [shared + make_prompt(20 + seed, seed=seed + 1) for seed in range(2)]
    first, second = (engine.add_request(each, GREEDY) for each in prompts)
    engine.step()
    [waiting] = engine.scheduler.waiting
    assert waiting.request_id == second and engine.kv.is_following(waiting)
    if how == "aborted":
        engine.abort(first)
    elif how == "preempted":
        engine.scheduler._preempt_last()
    else:
        assert engine.kv.states is not None
        monkeypatch.setattr(engine.kv.states.slots, "cut", lambda *_: False)
    outputs: dict[str, list[int]] = {first: [], second: []}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        engine.kv.check()
    expected = run(cold, prompts, max_tokens=TOKENS)
    assert outputs[second] == expected[1]
    assert outputs[first] == ([] if how == "aborted" else expected[0])
    assert not engine.kv.is_following(waiting)


@pytest.mark.parametrize("family", KINDS)
def test_a_hit_is_no_longer_than_kv_nor_than_the_state(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **ROOM, block_size=GRID)
    assert engine.kv.states is not None
    prompt = make_prompt(2 * GRID + 20)
    first = run(engine, [prompt], max_tokens=4)
    engine.kv.states.slots.pool.forget_cached()  # all KV is there, and no state
    assert run(engine, [prompt], max_tokens=4) == first
    assert found(engine) == 0
    engine.kv.pool.forget_cached()  # all states are there, and no KV
    assert run(engine, [prompt], max_tokens=4) == first
    assert found(engine) == 0
    assert run(engine, [prompt], max_tokens=4) == first
    assert found(engine) == 2 * GRID


@pytest.mark.parametrize("family", KINDS)
def test_outputs_of_one_prompt_start_from_one_state(family: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family, **ROOM)
    cold = make_engine(family, **ROOM, prefix_caching=False)
    prompt = make_prompt(75)
    engine.add_request(prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True, n=3))
    outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while engine.has_work:
        for output in engine.step():
            outputs[output.index] += output.token_ids
        engine.kv.check()
    assert list(outputs.values()) == run(cold, [prompt], max_tokens=TOKENS) * 3
    assert engine.metrics.forked_tokens == 2 * (len(prompt) - 1)
    assert engine.metrics.recomputed_tokens == 0
    assert engine.kv.states is not None and engine.kv.states.slots.pool.num_held == 0


@pytest.mark.parametrize("family", KINDS)
def test_a_preempted_request_goes_on_from_its_last_state(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **ROOM)
    cold = make_engine(family, **ROOM, prefix_caching=False)
    prompts = [make_prompt(80 + 9 * seed, seed=seed) for seed in range(4)]

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1:
            engine.scheduler._preempt_last()

    answers = run(engine, prompts, max_tokens=TOKENS, each_step=preempt_one)
    assert answers == run(cold, prompts, max_tokens=TOKENS)
    assert engine.metrics.preemptions > 10
    assert engine.metrics.resumed_tokens.total() > 0


@pytest.mark.parametrize("family", KINDS)
def test_a_place_that_the_server_names_is_found_by_the_second_request(
    family: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(family, **ROOM, block_size=GRID)
    cold = make_engine(family, **ROOM, block_size=GRID, prefix_caching=False)
    shared, counts = make_prompt(2 * GRID + 10), []
    for seed in range(3):
        prompt = shared + make_prompt(GRID, seed=seed + 1)
        expected = run(cold, [prompt], max_tokens=4)
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        engine.add_request(prompt, params, snapshot_at=[len(shared), len(prompt) - 3])
        tokens: list[int] = []
        while engine.has_work:
            for output in engine.step():
                tokens += output.token_ids
        assert [tokens] == expected
        counts.append(found(engine))
    assert counts == [0, 2 * GRID, 4 * GRID]


@pytest.mark.parametrize("is_named", [False, True])
def test_a_state_that_its_own_chat_has_passed_goes_before_older_ones_of_others(
    is_named: bool, make_engine: MakeEngine
) -> None:
    engine = make_engine("qwen3_5_text", **ROOM, block_size=GRID)
    assert engine.kv.states is not None
    run(engine, [make_prompt(100, seed=5)], max_tokens=4)
    turn = make_prompt(2 * GRID + 2)
    run(engine, [turn], max_tokens=4)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    places = [2 * GRID] if is_named else []
    engine.add_request([*turn[:-1], *make_prompt(70, seed=2)], params, snapshot_at=places)
    while engine.has_work:
        engine.step()
    assert found(engine) == 2 * GRID
    pool, [used] = engine.kv.states.slots.pool, engine.kv.states._used
    pool.allocate(pool.num_free)
    pool.allocate(1)  # the first to go
    assert (pool.lookup(used) is not None) is is_named
