"""Greedy output of models that cache latents: the same tokens whatever the tiers and steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import make_prompts, reference, run
from tiny_models import LATENT_FAMILIES, SPARSE_FAMILIES, make_model

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.executor.probe import inspect_model
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.units import GIB

MakeEngine = Callable[..., Engine]


@pytest.mark.parametrize("family", [*LATENT_FAMILIES, *SPARSE_FAMILIES])
def test_tiers_preemptions_and_a_restart_do_not_matter(
    family: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    prompts = make_prompts()
    expected = reference(family, prompts)
    options = {"disk_mib": 8, "disk_path": tmp_path, "fetch_policy": "fetch", "host_blocks": 12}
    engine = make_engine(family, hot_blocks=26, max_num_batched_tokens=32, **options)

    def preempt_one() -> None:
        if len(engine.scheduler.running) > 1 and engine.metrics.steps % 3 == 0:
            engine.scheduler._preempt_last()

    assert run(engine, prompts, each_step=preempt_one) == expected
    assert run(engine, prompts) == expected
    assert engine.metrics.preemptions > 0
    assert sum(engine.metrics.cached_tokens[tier] for tier in ("host", "disk")) > 0
    while engine.has_transfers:
        engine.step()
    engine.close()

    restarted = make_engine(family, **options)
    assert run(restarted, prompts) == expected
    assert restarted.metrics.cached_tokens["disk"] > 50


@pytest.mark.parametrize("family", ["deepseek_v3", "glm_moe_dsa"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_block_and_chunk_sizes_do_not_matter(
    family: str, block_size: int, chunk: int, make_engine: MakeEngine
) -> None:
    engine = make_engine(
        family, block_size=block_size, max_num_batched_tokens=chunk, max_num_seqs=4
    )
    assert run(engine, make_prompts()) == reference(family, make_prompts())


@pytest.mark.parametrize("overlap", [False, True])
def test_rotation_does_not_matter_and_recomputes_nothing(
    overlap: bool, make_engine: MakeEngine
) -> None:
    engine = make_engine(
        "minicpm3", hot_blocks=30, host_blocks=300, rotation_s=1e-6, overlap=overlap
    )
    engine.rates.link_bytes_per_s["host"] = 1e15  # a turn may be as short as it gets
    assert run(engine, make_prompts()) == reference("minicpm3", make_prompts())
    assert engine.metrics.rotations > 0
    assert engine.metrics.recomputed_tokens == 0


def test_what_was_stored_as_keys_and_values_is_not_found(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"disk_mib": 8, "disk_path": tmp_path, "fetch_policy": "fetch"}
    prompts = make_prompts()
    with monkeypatch.context() as patch:
        patch.setattr("hotset.attention.latent._expands_as_expected", lambda module: False)
        former = make_engine("deepseek_v3", **options)
        run(former, prompts)
        while former.has_transfers:
            former.step()
        former.close()
    engine = make_engine("deepseek_v3", **options)
    assert run(engine, prompts) == reference("deepseek_v3", prompts)
    assert engine.metrics.cached_tokens["disk"] == 0


@pytest.mark.parametrize(("family", "block_size"), [("deepseek_v3", 64), ("llama", 16)])
def test_a_block_of_latents_has_64_tokens_where_the_user_names_none(
    family: str, block_size: int
) -> None:
    loaded = LoadedModel(make_model(family), None, family, family, (2,), 512)
    options = Options.of(hot_gib=2**22 / GIB, max_model_len=96)
    engine = build_engine(options, loaded)
    token_bytes = inspect_model(loaded.model).bytes_per_token
    assert engine.sizes.block_size == block_size
    assert engine.sizes.block_bytes == block_size * token_bytes
    assert run(engine, make_prompts()) == reference(family, make_prompts())
    engine.close()
