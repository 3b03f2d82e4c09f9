"""Sparse attention over two ranks: all of them attend to what rank 0 selects."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import make_prompts, reference, run
from rank_engines import engine_over, load_otherwise_selecting
from tiny_models import SPARSE_FAMILIES

from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.options import Options
from hotset.ranks.driver import Ranks

MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_tiers_and_preemptions_do_not_matter(
    family: str, make_ranked: MakeEngine, tmp_path: Path
) -> None:
    prompts = make_prompts()
    expected = reference(family, prompts)
    tiers = {"disk_mib": 8, "disk_path": tmp_path, "fetch_policy": "fetch", "host_blocks": 12}
    engine = make_ranked(family, hot_blocks=26, max_num_batched_tokens=32, **tiers)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1 and engine.metrics.steps % 3 == 0:
            engine.scheduler._preempt_last()

    assert run(engine, prompts, each_step=preempt_one) == expected
    assert run(engine, prompts) == expected
    assert engine.metrics.preemptions > 0
    assert sum(engine.metrics.cached_tokens[tier] for tier in ("host", "disk")) > 0


def test_a_rank_that_would_select_other_tokens_attends_to_those_of_rank_0(pair: Ranks) -> None:
    loaded = pair.load(load_otherwise_selecting, "glm_moe_dsa")
    engine = engine_over(pair, loaded, hot_blocks=60, max_num_batched_tokens=24)
    with contextlib.closing(engine):
        assert run(engine, make_prompts()) == reference("glm_moe_dsa", make_prompts())


def test_no_request_turns_hot(make_ranked: MakeEngine) -> None:
    engine = make_ranked("deepseek_v32", hot_blocks=26, host_blocks=300)
    assert engine.sizes.hot is None
    assert run(engine, make_prompts()) == reference("deepseek_v32", make_prompts())


def test_hot_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="hot_tokens is 64, which works with one GPU"):
        Options.of(tp=2, hot_gib=1.0, host_gib=1.0, hot_tokens=64)
