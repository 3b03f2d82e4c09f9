"""Hot requests answer as resident ones do, and give back all that they took."""

import random
from collections.abc import Callable

import pytest
from engines import reference, run
from tiny_models import SPARSE_FAMILIES

from hotset.engine.engine import Engine

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
    options = {"hot_blocks": 42, "host_blocks": 200, "hot_tokens": SELECTED, **changes}
    return make_engine(family, model_changes=WIDE, **options)


def answers(family: str, prompts: list[list[int]]) -> list[list[int]]:
    return reference(family, prompts, max_tokens=24, **WIDE)


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
