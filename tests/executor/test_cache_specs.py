"""What the planner counts per token from a config is what the engine stores for the model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from family_configs import FAMILIES, TINY, build

from hotset.cli.plan_options import Options
from hotset.cost.cache_spec import KeysValues, Latent, State
from hotset.cost.catalog import bundled_config, bundled_models
from hotset.cost.families import shape_from_config
from hotset.errors import ModelError
from hotset.executor.probe import ModelLayout, inspect_model
from hotset.linear.fp8 import FP8
from hotset.memory.arena import DeviceArena
from hotset.memory.state_arena import StateArena

# Families that the engine refuses.
REFUSED = {
    "longcat_flash",
    "llama4_text",
    "mamba2",
}
HEADS = KeysValues(2, 20, 16)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@pytest.mark.parametrize(
    ("family", "facts"), FAMILIES, ids=[f"{i}-{m}" for i, (m, _) in enumerate(FAMILIES)]
)
def test_a_token_takes_the_bytes_that_the_planner_counts(
    family: str, facts: dict[str, Any]
) -> None:
    config = {**TINY, **facts, "model_type": family}
    model = build(config, "meta").eval()
    if family in REFUSED:
        with pytest.raises(ModelError, match=r"has layers of type|cannot run on text alone"):
            inspect_model(model)
        return
    layout, shape = inspect_model(model), shape_from_config(config, family)
    shape = replace(shape, index_dtype=DTYPES[layout.kv_dtype])  # that of the model, as KV is
    planned = shape.stored.kv_bytes_per_token(DTYPES[layout.kv_dtype])
    assert planned == layout.bytes_per_token
    specs = layout.cache_specs
    # The planner's layers are the engine's one by one; one that also attends is two of them.
    planned_layers = [layer.attention.stored for layer in shape.layers]
    parts = len(planned_layers) // model.config.num_hidden_layers
    attending = [planned_layers[parts * (index + 1) - 1] for index in layout.kv_layers]
    assert [a.cache.token_values for a in attending] == [spec.token_values for spec in specs]
    assert [a.indexer for a in attending] == [layer.indexer for layer in layout.layers]
    # So is what they keep of a sequence beside, in 16 bits where the planner's model has these.
    states = enumerate(planned_layers[::parts])
    kept = {i: a.cache for i, a in states if isinstance(a.cache, State)}
    assert {i: replace(spec, conv_itemsize=2) for i, spec in layout.states.items()} == kept
    if kept:
        narrow = inspect_model(model.to(torch.bfloat16))
        slots = StateArena(
            narrow.states, num_slots=1, dtype=narrow.dtype, device=torch.device("cpu")
        )
        assert slots.slot_bytes == shape.kv_bytes(0, "bf16")
        views = [*slots.recurrent.values(), *slots.columns.values()]
        assert slots.slot_bytes == sum(view.numel() * view.itemsize for view in views)
    check_arena(layout, planned)
    if any(layout.index_dims):
        layout = inspect_model(model.to(torch.bfloat16), index_dtype=FP8)
        rounded = replace(shape, index_dtype="fp8").stored
        assert rounded.index_bytes_per_token == layout.index_bytes
        assert rounded.kv_bytes_per_token("bf16") == layout.bytes_per_token < planned
        check_arena(layout, layout.bytes_per_token)


def check_arena(layout: ModelLayout, token_bytes: int) -> None:
    arena = DeviceArena(
        layout.cache_specs,
        num_blocks=2,
        block_size=4,
        dtype=layout.kv_dtype,
        device=torch.device("cpu"),
        index_dims=layout.index_dims,
        index_dtype=layout.index_dtype,
    )
    assert 2 * arena.block_bytes == arena.memory.nbytes == 2 * 4 * token_bytes
    assert sum(num_bytes for _, _, num_bytes in arena.runs(1)) == arena.block_bytes


@pytest.mark.parametrize("name", bundled_models())
def test_plan_says_what_the_engine_stores_of_a_token(name: str) -> None:
    config, _ = bundled_config(name)
    model = build(config, "meta").eval()
    try:
        layout = inspect_model(model, torch.bfloat16)
    except ModelError:
        assert shape_from_config(config, name).model_type in REFUSED
        return
    shape = Options(model=name, kv_dtype="bfloat16").request().shape
    assert shape.kv_bytes_per_token("bf16") == layout.bytes_per_token


def test_deepseek_v3_is_planned_as_its_latents_are_stored() -> None:
    here = Options(model="deepseek-v3", kv_dtype="bfloat16").request().shape
    published = Options(model="deepseek-v3", engine="published").request().shape
    assert here.kv_bytes_per_token("bf16") == 61 * 576 * 2 == 70_272
    assert published.kv_bytes_per_token("bf16") == 70_272
    assert here.attention_flops_per_token(1000) == 61 * 2 * 1000 * 128 * (576 + 512)


def test_the_arena_has_the_latents_of_a_layer_as_rows_beside_keys_and_values_of_others() -> None:
    specs = [Latent(8, 4, KeysValues(2, 12, 8)), KeysValues(2, 8, 8), Latent(16, 4, HEADS)]
    arena = DeviceArena(
        specs, num_blocks=3, block_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    arena.storage.copy_(torch.arange(arena.storage.numel()).view_as(arena.storage))
    assert [tuple(layer.shape) for layer in arena.layers] == [
        (3, 4, 12),
        (3, 2, 4, 2, 8),
        (3, 4, 20),
    ]
    parts = [layer.flatten(1) for layer in arena.layers]
    assert torch.equal(torch.cat(parts, dim=1), arena.storage)


def test_the_arena_has_the_keys_and_values_of_each_layer_in_one_run_of_bytes() -> None:
    specs = [KeysValues(2, 8, 6, window=4).stored, KeysValues(1, 24, 24)]
    arena = DeviceArena(
        specs, num_blocks=3, block_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    arena.storage.copy_(torch.arange(arena.storage.numel()).view_as(arena.storage))
    parts = []
    for layer, spec in zip(arena.layers, specs, strict=True):
        keys, values = layer.unbind(1)
        assert keys.shape == (3, 4, spec.num_kv_heads, spec.key_dim) == values.shape
        parts += [keys.flatten(1), values.flatten(1)]
    assert torch.equal(torch.cat(parts, dim=1), arena.storage)
