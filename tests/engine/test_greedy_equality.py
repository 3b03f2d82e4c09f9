"""Greedy output is the same tokens whatever the tiers, chunks, blocks and preemptions."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import make_prompts, reference, run
from tiny_models import FAMILIES

from hotset.engine.engine import Engine
from hotset.request import FinishReason, SamplingParams

MakeEngine = Callable[..., Engine]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return reference("llama", make_prompts())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_architecture_answers_as_transformers_does(
    family: str, make_engine: MakeEngine
) -> None:
    prompts = make_prompts()
    engine = make_engine(family, hot_blocks=60, host_blocks=100, max_num_batched_tokens=24)
    assert run(engine, prompts) == reference(family, prompts)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_block_and_chunk_sizes_do_not_matter(
    block_size: int, chunk: int, make_engine: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_engine(block_size=block_size, max_num_batched_tokens=chunk, max_num_seqs=4)
    assert run(engine, make_prompts()) == expected


STARVED = {"hot_blocks": 26, "max_num_batched_tokens": 32}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "tiers",
    [
        {"hot_blocks": 200},
        STARVED,
        {**STARVED, "host_blocks": 300},
        {**STARVED, "host_blocks": 5},
        {**STARVED, "host_blocks": 300, "prefix_caching": False},
        {**STARVED, "host_blocks": 300, "fetch_policy": "fetch"},
        {**STARVED, "host_blocks": 300, "fetch_policy": "recompute"},
        {**STARVED, "host_blocks": 5, "disk_mib": 8, "fetch_policy": "fetch"},
    ],
    ids=lambda tiers: "-".join(f"{k}={v}" for k, v in tiers.items()),
)
def test_tiers_roomy_and_starved_do_not_matter(
    tiers: dict[str, object],
    overlap: bool,
    make_engine: MakeEngine,
    tmp_path: Path,
    expected: list[list[int]],
) -> None:
    if "disk_mib" in tiers:
        tiers = {**tiers, "disk_path": tmp_path}
    engine = make_engine(**tiers, overlap=overlap)
    engine.scheduler.ahead_tokens = 1  # so that some are preempted
    prompts = make_prompts()
    for _ in range(3):  # later rounds find prefixes in all tiers
        assert run(engine, prompts) == expected
    if tiers["hot_blocks"] == 26:
        assert engine.metrics.preemptions > 0


@pytest.mark.parametrize("host_blocks", [0, 300])
def test_a_preemption_before_every_step_does_not_matter(
    host_blocks: int, make_engine: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_engine(host_blocks=host_blocks, max_num_batched_tokens=48)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1:
            engine.scheduler._preempt_last()

    assert run(engine, make_prompts(), each_step=preempt_one) == expected
    assert engine.metrics.preemptions > 10  # one for nearly every step


def test_with_room_in_the_host_tier_a_preemption_recomputes_nothing(
    make_engine: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_engine(hot_blocks=26, host_blocks=300, fetch_policy="fetch")
    engine.scheduler.ahead_tokens = 1
    assert run(engine, make_prompts()) == expected
    assert engine.metrics.preemptions > 0
    assert engine.metrics.recomputed_tokens == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_rotation_does_not_matter_and_recomputes_nothing(
    overlap: bool, make_engine: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_engine(hot_blocks=30, host_blocks=300, rotation_s=1e-6, overlap=overlap)
    engine.rates.link_bytes_per_s["host"] = 1e15  # a turn may be as short as it gets
    assert run(engine, make_prompts()) == expected
    assert engine.metrics.rotations > 0
    assert engine.metrics.recomputed_tokens == 0


def test_a_second_round_of_the_same_prompts_hits_the_prefix_cache(
    make_engine: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_engine()
    run(engine, make_prompts())
    computed = engine.metrics.computed_tokens
    assert run(engine, make_prompts()) == expected
    assert engine.metrics.computed_tokens - computed < computed / 2
    assert engine.metrics.cached_tokens["device"] > 0


def test_a_restart_answers_from_the_disk_tier(
    make_engine: MakeEngine, tmp_path: Path, expected: list[list[int]]
) -> None:
    options = {"disk_mib": 16, "disk_path": tmp_path, "fetch_policy": "fetch"}
    first = make_engine(**options)
    run(first, make_prompts())
    while first.has_transfers:
        first.step()
    first.close()

    second = make_engine(**options)
    assert run(second, make_prompts()) == expected
    assert second.metrics.cached_tokens["disk"] > 50
    second.close()

    other = make_engine(seed=1, **options)  # other weights must not find these blocks
    assert run(other, make_prompts()) == reference("llama", make_prompts(), seed=1)
    assert other.metrics.cached_tokens["disk"] == 0


def test_n_outputs_of_a_prompt_are_those_of_n_requests(
    make_engine: MakeEngine, expected: list[list[int]]
) -> None:
    engine = make_engine(max_num_seqs=4)
    outputs: dict[tuple[str, int], list[int]] = {}
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, n=3)
    ids = [engine.add_request(prompt, params) for prompt in make_prompts()]
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    assert outputs == {
        (request_id, index): tokens
        for request_id, tokens in zip(ids, expected, strict=True)
        for index in range(3)
    }
    assert engine.kv.pool.num_held == 0


def abort_at(engine: Engine, step: int) -> None:
    """Abort the middle one of three requests after `step` steps and finish the others."""
    ids = [
        engine.add_request(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        for prompt in make_prompts(num=3)
    ]
    for _ in range(step):
        engine.step()
    engine.abort(ids[1])
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
    assert all(reason is FinishReason.LENGTH for name, reason in reasons.items() if name != ids[1])


@pytest.mark.parametrize("step", range(14))
def test_an_abort_at_any_moment_gives_every_block_back(step: int, make_engine: MakeEngine) -> None:
    engine = make_engine(hot_blocks=26, host_blocks=40, max_num_batched_tokens=16)
    for _ in range(2):
        abort_at(engine, step)
    while engine.has_transfers:
        engine.step()
    engine.step()
    engine.kv.check()
    assert engine.kv.pool.num_held == 0
