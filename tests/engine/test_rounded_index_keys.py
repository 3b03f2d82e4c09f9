"""Index keys in 8 bits: the same tokens wherever they lie, whatever the steps.

The reference is transformers' model with its indexers' keys rounded: `rounded_scores`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import logits_of, make_prompts, reference, run
from test_hot_requests import WIDE, assert_all_is_back, hot_engine, long_prompts
from test_simulated import DRAWN, HOT, answers, use_kernels
from tiny_models import SPARSE_FAMILIES, make_model

from hotset.engine.engine import Engine
from hotset.engine.load import load_engine
from hotset.errors import ConfigError
from hotset.executor.probe import inspect_model
from hotset.executor.simulated import Simulated
from hotset.linear.fp8 import FP8
from hotset.options import Options

MakeEngine = Callable[..., Engine]


def expected(family: str, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return reference(family, prompts, index_dtype="fp8", **options)


def make_rounded(make_engine: MakeEngine, *args: Any, **options: Any) -> Engine:
    return make_engine(*args, index_dtype="fp8", **options)


def test_rounding_decides_tokens_here() -> None:
    """Else the equality of the tests below would say nothing about it."""
    prompts = make_prompts()
    assert expected("deepseek_v32", prompts) != reference("deepseek_v32", prompts)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_tiers_preemptions_and_a_restart_do_not_matter(
    family: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    prompts = make_prompts()
    wanted = expected(family, prompts)
    options = {"disk_mib": 8, "disk_path": tmp_path, "fetch_policy": "fetch", "host_blocks": 12}
    engine = make_rounded(make_engine, family, hot_blocks=26, max_num_batched_tokens=32, **options)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1 and engine.metrics.steps % 3 == 0:
            engine.scheduler._preempt_last()

    assert run(engine, prompts, each_step=preempt_one) == wanted
    assert run(engine, prompts) == wanted
    assert engine.metrics.preemptions > 0
    assert sum(engine.metrics.cached_tokens[tier] for tier in ("host", "disk")) > 0
    while engine.has_transfers:
        engine.step()
    engine.close()

    restarted = make_rounded(make_engine, family, **options)
    assert run(restarted, prompts) == wanted
    assert restarted.metrics.cached_tokens["disk"] > 50
    while restarted.has_transfers:
        restarted.step()
    restarted.close()

    other = make_engine(family, **options)  # keys of its own dtype are other chains
    assert run(other, prompts) == reference(family, prompts)
    assert other.metrics.cached_tokens["disk"] == 0


@pytest.mark.parametrize("block_size", [4, 12])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_block_and_chunk_sizes_do_not_matter(
    block_size: int, chunk: int, make_engine: MakeEngine
) -> None:
    engine = make_rounded(
        make_engine, "glm_moe_dsa", block_size=block_size, max_num_batched_tokens=chunk
    )
    assert run(engine, make_prompts()) == expected("glm_moe_dsa", make_prompts())


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_hot_request_answers_as_a_resident_one(
    has_kernels: bool, overlap: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_kernels:
        use_kernels(monkeypatch)
    prompts = long_prompts()
    engine = hot_engine(make_engine, "glm_moe_dsa", index_dtype="fp8", overlap=overlap)
    wanted = expected("glm_moe_dsa", prompts, max_tokens=24, **WIDE)
    assert run(engine, prompts, max_tokens=24) == wanted
    assert engine.metrics.turned_hot > 1 and engine.metrics.preemptions == 0
    assert_all_is_back(engine)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_logits_of_hot_and_resident_requests_are_the_same_bits(
    family: str, make_engine: MakeEngine
) -> None:
    options = {"hot_blocks": 150, "hot_tokens": 20, "index_dtype": "fp8"}
    engines = [hot_engine(make_engine, family, **options) for _ in range(2)]
    resident, hot = (
        logits_of(engine, long_prompts(3), max_tokens=30, turn=turn)
        for engine, turn in zip(engines, (False, True), strict=True)
    )
    assert engines[1].metrics.turned_hot == 3 and not engines[0].metrics.turned_hot
    assert len(resident) == len(hot) and all(map(torch.equal, resident, hot))


@pytest.mark.parametrize("has_kernels", [False, True])
def test_drawn_selections_are_the_same_for_hot_requests(
    has_kernels: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = Simulated(DRAWN, places_prompts=True)
    resident, _ = answers(make_engine, simulated, hot_blocks=200, index_dtype="fp8")
    if has_kernels:
        use_kernels(monkeypatch)
    hot, engine = answers(make_engine, simulated, **HOT, index_dtype="fp8")
    assert hot == resident
    assert engine.metrics.turned_hot > 1


def test_more_requests_fit_and_start_says_what_rounding_changes(make_engine: MakeEngine) -> None:
    engine = make_rounded(make_engine, "deepseek_v32")
    layout = inspect_model(make_model("deepseek_v32"), index_dtype=FP8)
    assert layout.index_bytes == 3 * (16 + 4)
    assert engine.sizes.block_bytes == 4 * (3 * 4 * 24 + 60)
    [line] = [line for line in engine.report.splitlines() if line.startswith("index keys in fp8")]
    share = float(line.split(" select ")[1].split("%")[0])
    assert "60 B per token" in line and 80 < share < 100
    assert "index keys" not in make_engine("deepseek_v32").report


def test_what_cannot_be_rounded_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no indexer .* expected auto"):
        make_rounded(make_engine, "llama")
    with pytest.raises(ConfigError, match="block_size is 6 and index_dtype is fp8"):
        Options.of(index_dtype="fp8", block_size=6)
    with pytest.raises(ConfigError, match="index keys of 24 numbers cannot be rounded"):
        make_rounded(make_engine, "deepseek_v32", model_changes={"index_head_dim": 24})
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no indexer"):  # before it is loaded
        load_engine(Options.of(model=str(tmp_path), device="cpu", index_dtype="fp8"))
