"""Hot requests answer as resident ones do, and give back all that they took."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from engines import logits_of, reference, run
from fake_sparse import CpuSparse
from tiny_models import SPARSE_FAMILIES

from hotset.attention.hot_rows import HotRows
from hotset.attention.sparse.gathered import GatheredSelection
from hotset.cost.tuning import TUNINGS
from hotset.engine import rank_setup
from hotset.engine.engine import Engine
from hotset.kernels.gather_rows import gather_rows
from hotset.kernels.resolve_rows import resolve_rows
from hotset.request import SamplingParams
from hotset.sequence import Kind, Request

MakeEngine = Callable[..., Engine]
SELECTED = 16  # by a step of the tiny models
WIDE = {"kv_lora_rank": 72}  # rows are five times as wide as index keys


def long_prompts(num: int = 5) -> list[list[int]]:
    """Prompts of 40 to 64 tokens, two of which begin alike."""
    rng = random.Random(num)
    prompts = [[rng.randrange(3, 256) for _ in range(rng.randint(40, 64))] for _ in range(num)]
    prompts[1][:22] = prompts[0][:22]
    return prompts


def hot_engine(make_engine: MakeEngine, family: str = "deepseek_v32", **changes: object) -> Engine:
    """An engine with room for about two resident requests and a half."""
    options = {"hot_blocks": 42, "host_blocks": 200, "hot_tokens": SELECTED, "model_changes": WIDE}
    return make_engine(family, **(options | changes))


def answers(family: str, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return reference(family, prompts, max_tokens=24, **WIDE, **options)


def arena_of(engine: Engine) -> Any:
    return engine.executor.runner._arena  # type: ignore[attr-defined]


def assert_all_is_back(engine: Engine) -> None:
    while engine.has_transfers:
        engine.step()
    engine.kv.poll()
    engine.kv.check()
    assert engine.kv.pool.num_held == 0 and engine.kv.hot is not None
    assert engine.kv.hot.num_hot == 0
    assert engine.tiers is not None
    assert all(not payload.pins for payload in engine.tiers.host._payloads.values())


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_a_hot_request_answers_as_a_resident_one(family: str, make_engine: MakeEngine) -> None:
    prompts = long_prompts()
    engine = hot_engine(make_engine, family)
    assert run(engine, prompts, max_tokens=24) == answers(family, prompts)
    assert engine.metrics.turned_hot > 1 and engine.metrics.preemptions == 0
    assert_all_is_back(engine)


@pytest.mark.parametrize(
    ("hot_tokens", "block_size", "hot_blocks"), [(32, 4, 46), (20, 4, 42), (17, 3, 54), (16, 8, 24)]
)
@pytest.mark.parametrize("overlap", [False, True])
def test_slots_and_block_sizes_do_not_matter(
    hot_tokens: int, block_size: int, hot_blocks: int, overlap: bool, make_engine: MakeEngine
) -> None:
    prompts = long_prompts()
    engine = hot_engine(
        make_engine,
        "glm_moe_dsa",
        hot_tokens=hot_tokens,
        block_size=block_size,
        hot_blocks=hot_blocks,
        overlap=overlap,
    )
    assert run(engine, prompts, max_tokens=24) == answers("glm_moe_dsa", prompts)
    assert engine.metrics.turned_hot > 0
    assert_all_is_back(engine)


@pytest.mark.parametrize("hot_blocks", [42, 200])
@pytest.mark.parametrize(
    ("family", "num", "seed"), [("glm_moe_dsa", 3, 0), ("deepseek_v32", 5, 2), ("hy_v4", 8, 5)]
)
def test_answers_are_those_of_transformers_where_scores_are_equal(
    family: str, num: int, seed: int, hot_blocks: int, make_engine: MakeEngine
) -> None:
    """In one step each some of several keys that score exactly 0 are selected."""
    prompts = long_prompts(num)[:5]
    engine = hot_engine(make_engine, family, hot_blocks=hot_blocks, seed=seed)
    found = run(engine, prompts, max_tokens=24)
    assert found == reference(family, prompts, max_tokens=24, seed=seed, **WIDE)
    assert found != reference(family, prompts, max_tokens=24, seed=seed, ties="any", **WIDE)


DENSE = {"mlp_layer_types": ["dense"] * 3}
# Of six layers four share a selection, then two: rows of several layers come at once.
SHARED = {
    "num_hidden_layers": 6,
    "indexer_types": ["full", "shared", "shared", "shared", "full", "shared"],
    "mlp_layer_types": ["dense"] * 6,
}


@pytest.mark.parametrize(
    ("family", "changes", "row_prefetch"),
    [
        *((family, {}, 0) for family in SPARSE_FAMILIES),
        ("glm_moe_dsa", SHARED, 0),
        ("glm_moe_dsa", SHARED, 1),
        *((family, {}, 2) for family in SPARSE_FAMILIES if family != "hy_v4"),
        ("hy_v4", DENSE, 2),  # its only layer with experts comes last
        ("glm_moe_dsa", SHARED, 2),
    ],
)
def test_logits_of_hot_and_resident_requests_are_the_same_bits(
    family: str, changes: dict[str, Any], row_prefetch: int, make_engine: MakeEngine
) -> None:
    prompts = long_prompts(3)
    options: dict[str, Any] = {"hot_blocks": 150, "hot_tokens": 20, "row_prefetch": row_prefetch}
    options["model_changes"] = WIDE | changes
    engines = [hot_engine(make_engine, family, **options) for _ in range(2)]
    resident, hot = (
        logits_of(engine, prompts, max_tokens=30, turn=turn)
        for engine, turn in zip(engines, (False, True), strict=True)
    )
    assert engines[1].metrics.turned_hot == 3 and not engines[0].metrics.turned_hot
    for one, other in zip(resident, hot, strict=True):
        assert torch.equal(one, other)
    engine = engines[1]
    engine.take_counts()
    assert engine.metrics.hot_hits > 100 and engine.metrics.hot_misses > 100
    metrics, num_layers = engine.metrics, len(arena_of(engine).layers)
    num_selections = len(engine.executor.runner._hot._selections)
    assert (0 < metrics.hot_guessed_right < metrics.hot_guessed) == (row_prefetch == 2)
    rows = metrics.moved_bytes["host>slots"] / (80 * 4)
    expected = (metrics.hot_misses + metrics.hot_guessed) * num_layers / num_selections
    assert expected * 0.8 < rows < expected * 1.2


def test_a_step_that_breaks_off_costs_one_request_and_no_other_reads_its_slots(
    make_engine: MakeEngine,
) -> None:
    prompts = long_prompts(4)
    engine = hot_engine(make_engine, hot_blocks=48)
    expected = answers("deepseek_v32", prompts)
    hot = engine.executor.runner._attention._hot
    gather, num_calls = hot._gather, [0]

    def break_off(*args: Any) -> None:
        num_calls[0] += 1
        if num_calls[0] in (20, 50):  # its layer's slots are told to hold what did not come
            raise RuntimeError("out of memory")
        gather(*args)

    hot._gather = break_off
    outputs: dict[str, list[int]] = {}
    failed = []
    for prompt in prompts:
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        outputs[engine.add_request(prompt, params)] = []
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
            if output.error is not None:
                failed.append(output.request_id)
        engine.kv.check()
    assert len(failed) == 2 and engine.metrics.turned_hot > 1
    for (request_id, tokens), wanted in zip(outputs.items(), expected, strict=True):
        assert request_id in failed or tokens == wanted
    assert_all_is_back(engine)


@pytest.mark.parametrize("guessed", ["nothing", "all that is wrong", "any token"])
def test_a_wrong_guess_changes_no_bit_and_costs_rows_alone(
    guessed: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess is replaced by none, by tokens that are not in it, or by random ones."""
    rng = torch.Generator().manual_seed(0)
    choose = GatheredSelection._highest

    def replaced(self: Any, *asked: Any, is_guess: bool = False) -> torch.Tensor:
        found = choose(self, *asked, is_guess=is_guess)
        if not is_guess:
            return found
        length = int(asked[-1])
        others = torch.tensor(sorted(set(range(length)) - set(found[0].tolist())))
        others = others[torch.randperm(len(others), generator=rng)]
        kinds = {
            "nothing": torch.full((SELECTED,), -1),
            "all that is wrong": others[:SELECTED],
            "any token": torch.randperm(length, generator=rng)[:SELECTED],
        }
        return kinds[guessed].int().unsqueeze(0)

    monkeypatch.setattr(GatheredSelection, "_highest", replaced)
    prompts, logits = long_prompts(3), {}
    for row_prefetch in (0, 2):
        options = {"hot_blocks": 150, "hot_tokens": 20, "row_prefetch": row_prefetch}
        engine = hot_engine(make_engine, **options)
        logits[row_prefetch] = logits_of(engine, prompts, max_tokens=30, turn=True)
    engine.take_counts()
    assert all(map(torch.equal, logits[0], logits[2])) and len(logits[0]) == len(logits[2])
    assert engine.metrics.hot_misses > 1000
    assert (engine.metrics.hot_guessed == 0) == (guessed == "nothing")


def test_what_is_guessed_right_is_not_waited_for(make_engine: MakeEngine) -> None:
    prompts, misses = long_prompts(3), {}
    for row_prefetch in (0, 2):
        options = {"hot_blocks": 150, "hot_tokens": 20, "row_prefetch": row_prefetch}
        options["model_changes"] = WIDE | DENSE  # all layers but the first are guessed for
        engine = hot_engine(make_engine, **options)
        logits_of(engine, prompts, max_tokens=30, turn=True)
        engine.take_counts()
        misses[row_prefetch] = engine.metrics.hot_misses
    assert misses[2] < 0.95 * misses[0] and engine.metrics.hot_guessed_right > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are compiled: test_gpu_hot_requests.py")
@pytest.mark.parametrize("row_prefetch", [0, 2])
def test_a_gpus_kernels_find_and_fetch_the_same_rows(
    row_prefetch: int, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched in Triton's interpreter, with attention by a fake of FlashInfer."""

    def choose(arena: Any, layers: Any, *, max_context: int, hot: HotRows, **_: Any) -> CpuSparse:
        hot.tables._resolve, hot._gather = resolve_rows, gather_few
        return CpuSparse(arena, layers, max_context=max_context, hot=hot)

    gather_few = partial(gather_rows, tuning=replace(TUNINGS["cuda"], gather_programs=3))

    monkeypatch.setattr(rank_setup, "choose_backend", choose)
    wide = {**WIDE, "mlp_layer_types": ["dense"] * 3}
    prompts = [prompt[:45] for prompt in long_prompts(2)]
    engine = make_engine(
        "glm_moe_dsa",
        model_changes=wide,
        host_blocks=80,
        hot_blocks=19,
        hot_tokens=SELECTED,
        max_model_len=52,
        max_num_seqs=4,
        row_prefetch=row_prefetch,
    )
    expected = reference("glm_moe_dsa", prompts, max_tokens=6, **wide)
    assert run(engine, prompts, max_tokens=6) == expected
    engine.take_counts()
    assert engine.metrics.turned_hot > 0
    assert (engine.metrics.hot_guessed_right > 0) == (row_prefetch == 2)
    assert_all_is_back(engine)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_the_cost_model_says_when_requests_turn_hot(family: str, make_engine: MakeEngine) -> None:
    engine = hot_engine(make_engine, family, hot_tokens=None, max_num_seqs=16)
    assert engine.sizes.hot is not None and engine.sizes.hot.num_slots == 2 * SELECTED
    choose = engine.scheduler._users_at_once
    assert choose is not None
    assert choose(1, 60.0) == 1 and 1 <= choose(100, 60.0) <= 16
    prompts = long_prompts()
    assert run(engine, prompts, max_tokens=24) == answers(family, prompts)
    assert_all_is_back(engine)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("family", "index_dtype"),
    [*((family, "auto") for family in SPARSE_FAMILIES), ("deepseek_v32", "fp8")],
)
def test_a_request_preempted_at_every_step_goes_on_hot_and_answers_the_same(
    family: str,
    index_dtype: str,
    overlap: bool,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while its index keys are on their way."""
    prompts = long_prompts(3)
    options = {"index_dtype": index_dtype, "overlap": overlap}
    engine = hot_engine(make_engine, family, hot_blocks=90, **options)
    hot = engine.kv.hot
    assert hot is not None and engine.tiers is not None
    turned, rng, gone_on = set(), random.Random(0), []
    go_on = hot.go_on
    monkeypatch.setattr(hot, "go_on", lambda one: go_on(one) and not gone_on.append(one))

    def preempt() -> None:
        """One that has its next token to compute, and now and then one in midst of its arrival."""
        for request in engine.scheduler.running:
            if request.sequence_id not in turned and hot.turn_hot(request):
                turned.add(request.sequence_id)
        seated = [one for one in engine.scheduler.running if one.kv.seat is not None]
        done = [one for one in seated if one.kind is Kind.DECODE and not one.is_complete]
        arriving = [one for one in seated if one.kv.arriving and rng.random() < 0.2]
        for victim in [*done[:1], *arriving[:1]]:
            engine.scheduler.running.remove(victim)
            engine.scheduler._preempt(victim)

    found = run(engine, prompts, max_tokens=24, each_step=preempt)
    assert found == answers(family, prompts, index_dtype=index_dtype)
    assert len(turned) == 3 and len(gone_on) > 40
    assert_all_is_back(engine)


def test_a_request_that_goes_on_hot_brings_up_its_index_keys_and_last_block_alone(
    make_engine: MakeEngine,
) -> None:
    prompts = long_prompts()[:1]
    engine = hot_engine(make_engine, hot_blocks=60)
    preempted: list[Request] = []

    def preempt_once() -> None:
        if engine.scheduler.running and not preempted:
            [request] = engine.scheduler.running
            assert engine.kv.hot is not None
            if request.kv.seat is None:
                engine.kv.hot.turn_hot(request)
            elif request.kv.num_computed_tokens % 4 == 2:
                preempted.append(engine.scheduler._preempt_last())

    found = run(engine, prompts, max_tokens=24, each_step=preempt_once)
    assert found == answers("deepseek_v32", prompts)
    [request] = preempted
    num_full = (len(prompts[0]) + 24) // 4
    [*_, (_, _, index_bytes)], arena = arena_of(engine).runs(0), arena_of(engine)
    moved = engine.metrics.moved_bytes["host>device"] - arena.block_bytes  # of the last one
    assert 0 < moved <= num_full * index_bytes < num_full * arena.block_bytes / 5
    assert request.kv.was_hot and engine.metrics.recomputed_tokens == 0
