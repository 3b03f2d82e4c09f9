"""Many requests at once, with everything going wrong that can."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import reference

from hotset.engine.engine import Engine
from hotset.request import FinishReason, SamplingParams

MakeEngine = Callable[..., Engine]
NUM_REQUESTS = 256


def damage(slab: Path, rng: random.Random) -> None:
    """Overwrite a random stretch of the slab, or cut it short."""
    size = slab.stat().st_size
    if rng.random() < 0.8:
        with slab.open("r+b") as file:
            file.seek(rng.randrange(max(1, size - 8192)))
            file.write(rng.randbytes(8192))
    else:
        os.truncate(slab, size // 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ["llama", "lfm2", "bamba"])  # the others keep a state
def test_a_soak_of_256_requests_with_aborts_priorities_and_faults_ends_as_it_began(
    family: str, seed: int, make_engine: MakeEngine, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        family,
        block_size=16 if family == "bamba" else 4,
        hot_blocks=80,
        host_blocks=60,
        disk_mib=6,
        disk_path=tmp_path,
        fetch_policy="fetch",
        overlap=bool(seed),
        rotation_s=0.01 if seed else None,
        max_num_seqs=32,
        max_num_batched_tokens=128,
    )
    engine.scheduler.ahead_tokens = 1  # so that many are preempted
    num_shared = 66 if family == "bamba" else 30  # its states are kept after 64 tokens
    starts = [[rng.randrange(3, 256) for _ in range(num_shared)] for _ in range(12)]
    prompts = [
        rng.choice(starts) + [rng.randrange(3, 256) for _ in range(rng.randint(1, 20))]
        for _ in range(NUM_REQUESTS)
    ]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    pending = list(enumerate(prompts))
    open_ids: dict[str, int] = {}
    tokens: dict[int, list[int]] = {i: [] for i in range(NUM_REQUESTS)}
    reasons: dict[int, FinishReason] = {}
    steps = 0
    while pending or engine.has_work:
        steps += 1
        assert steps < 50_000, "the engine does not finish"
        for _ in range(rng.randint(0, 16)):
            if pending:
                index, prompt = pending.pop()
                open_ids[engine.add_request(prompt, params, priority=rng.randint(0, 2))] = index
        for output in engine.step():
            index = open_ids[output.request_id]
            tokens[index] += output.token_ids
            if output.finish_reason is not None:
                reasons[index] = output.finish_reason
                del open_ids[output.request_id]
        engine.kv.check()
        if open_ids and rng.random() < 0.1:
            engine.abort(rng.choice(sorted(open_ids)))
        if rng.random() < 0.05:
            damage(tmp_path / "blocks.slab", rng)
        if rng.random() < 0.05:
            engine.kv.pool.forget_cached()
            if engine.kv.states is not None:
                engine.kv.states.slots.pool.forget_cached()
    while engine.has_transfers or (engine.kv.states is not None and engine.kv.states._due):
        engine.step()
    engine.step()

    engine.kv.check()
    assert engine.kv.pool.num_held == 0
    if engine.kv.states is not None:
        assert engine.kv.states.slots.pool.num_held == 0
        assert engine.metrics.state_hits["host"] > 0 and engine.metrics.state_hits["disk"] > 0
    assert engine.tiers is not None
    engine.tiers.check()
    assert engine.tiers.host.num_evictable == engine.tiers.host.num_slots  # nothing is kept
    assert len(reasons) == NUM_REQUESTS
    done = [i for i, reason in reasons.items() if reason is FinishReason.LENGTH]
    assert set(reasons.values()) == {FinishReason.LENGTH, FinishReason.ABORT}
    # The run did exercise what it is for.
    assert engine.metrics.preemptions > 0
    assert engine.metrics.cached_tokens["host"] > 0
    assert engine.metrics.cached_tokens["disk"] > 0
    assert engine.metrics.faults.total() > 0
    sample = rng.sample(done, 40)
    assert [tokens[i] for i in sample] == reference(
        family, [prompts[i] for i in sample], max_tokens=8
    )
