"""What the planner counts for each rank is what a rank's part of the model holds, to the byte."""

from typing import Any

import pytest
import torch
from family_configs import FAMILIES, TINY, build

from hotset.cost.catalog import bundled_config, bundled_models
from hotset.cost.families import shape_from_config
from hotset.cost.layout import Layout, check_layout, shard_model
from hotset.cost.shape import ModelShape
from hotset.errors import ModelError, PlanError
from hotset.executor.probe import inspect_model
from hotset.memory.arena import DeviceArena
from hotset.memory.state_arena import StateArena
from hotset.model.cut_model import ModelCutter
from hotset.parallel import group

# Refused: their code reads counts of heads from the config, or computes experts in its own way.
REFUSED = {"phi3", "longcat_flash", "llama4_text"}
NOT_RUN = {"mamba2", "nemotron-nas"}  # by one GPU neither
META, BLOCK = torch.device("meta"), 16


CUT = [each for each in FAMILIES if each[0] not in REFUSED | NOT_RUN]
WITH_EXPERTS = [
    (model_type, facts)
    for model_type, facts in CUT
    if shape_from_config({**TINY, **facts, "model_type": model_type}, "it").moe_layers
]
NOT_CUT = [each for each in FAMILIES if each[0] in REFUSED]
BUNDLED = [
    name
    for name in bundled_models()
    if shape_from_config(bundled_config(name)[0], name).model_type not in REFUSED | NOT_RUN
]


def rank_part(config: dict[str, Any], layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The first rank's part of a model of this config, on `meta`, but for its head."""
    model = build(config, "meta")
    monkeypatch.setattr(group, "_current", group.Group(0, layout, torch.device("cpu"), True))
    ModelCutter(model, "it").cut_all(model)
    return model


def held_bytes(model: Any, size: int) -> int:
    """Of all parameters, with a rank's rows of a head that is not the embedding."""
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        num_bytes -= head.nbytes - head[: -(-len(head) // size)].nbytes
    return num_bytes


def check(config: dict[str, Any], spread: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare weights, KV and states."""
    size = spread.tp
    shape = shape_from_config(config, "it").stored.with_weights("fp32")
    model = rank_part(config, spread, monkeypatch)
    shard = shard_model(shape, spread, has_whole_embedding=True)
    assert shard.dense_bytes + shard.experts_bytes == held_bytes(model, size)
    layout = inspect_model(model)
    arena = DeviceArena(
        layout.cache_specs,
        num_blocks=2,
        block_size=BLOCK,
        dtype=layout.kv_dtype,
        device=META,
        index_dims=layout.index_dims,
    )
    assert arena.block_bytes == BLOCK * shape.kv_bytes_per_token("fp32", tp=size)
    if layout.states:
        states = StateArena(layout.states, num_slots=3, dtype=layout.dtype, device=META)
        planned = sum(n * a.state_bytes(size) for a, _, n in shape.readers)
        columns = sum(each[0].nbytes for each in states.columns.values())
        # The planner has columns of a convolution in 16 bits.
        assert 0 <= states.slot_bytes - columns // 2 - planned < 16


def most_ranks(shape: ModelShape) -> int:
    """Up to 8 that can share it."""
    for size in (8, 4, 3, 2):
        try:
            check_layout(Layout(size), shape, None)
        except PlanError:
            continue
        return size
    raise AssertionError(f"nothing divides {shape.name}")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("model_type", "facts"), CUT, ids=[f"{i}-{m}" for i, (m, _) in enumerate(CUT)]
)
def test_a_rank_of_each_family_holds_what_the_planner_counts(
    model_type: str, facts: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check({**TINY, **facts, "model_type": model_type}, Layout(size), monkeypatch)


@pytest.mark.parametrize(
    "layout", [Layout(dp=2, es=2), Layout(dp=2, ep=2), Layout(tp=2, ep=2)], ids=str
)
@pytest.mark.parametrize(
    ("model_type", "facts"), WITH_EXPERTS, ids=[f"{i}-{m}" for i, (m, _) in enumerate(WITH_EXPERTS)]
)
def test_a_rank_that_shares_experts_holds_what_the_planner_counts(
    model_type: str, facts: dict[str, Any], layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    check({**TINY, **facts, "model_type": model_type}, layout, monkeypatch)


@pytest.mark.parametrize("name", BUNDLED)
def test_a_rank_of_each_bundled_model_holds_what_the_planner_counts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = bundled_config(name)
    check(config, Layout(most_ranks(shape_from_config(config, name))), monkeypatch)


@pytest.mark.parametrize(
    ("model_type", "facts"), NOT_CUT, ids=[f"{i}-{m}" for i, (m, _) in enumerate(NOT_CUT)]
)
def test_other_families_are_refused_by_name(
    model_type: str, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"\bit\b.*use one GPU"):
        rank_part({**TINY, **facts, "model_type": model_type}, Layout(2), monkeypatch)
