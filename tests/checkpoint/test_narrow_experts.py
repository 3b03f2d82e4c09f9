"""Experts keep the bytes of their checkpoint in host memory and on disk, and the same values."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run
from safetensors.torch import load_file, save_file
from test_fp8_blocks import save_in_blocks
from test_int_groups import (
    AWQ,
    FLOAT_ROWS,
    FLOAT_WHOLE,
    GPTQ,
    NVFP4_MODELOPT,
    NVFP4_PACKED,
    PACKED,
    awq,
    float_rows,
    float_whole,
    gptq,
    nvfp4_modelopt,
    nvfp4_packed,
    packed,
)  # fmt: skip
from test_int_groups import save as save_integers
from tiny_models import make_model
from tiny_tokenizer import make_backend
from transformers import PreTrainedTokenizerFast

from hotset.cost.families import shape_from_config
from hotset.engine.load import load_engine
from hotset.errors import ModelError
from hotset.executor.probe import weights_bytes
from hotset.experts import hosting, sizes
from hotset.experts.disk import DiskExperts
from hotset.experts.host import HostExperts
from hotset.experts.store import ExpertStore
from hotset.experts.weights import Narrow, experts_layers
from hotset.model import loader
from hotset.model.dummy import load_dummy
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.units import GIB
from hotset.weight_format import MXFP4

PROMPTS = [[5, 9, 2, 7], [3, 3, 8, 1, 6, 4], [11]]
FP8_SIZES = {
    "hidden_size": 192,
    "moe_intermediate_size": 192,
    "head_dim": 128,
}  # ragged: blocks of 128 and 64
FORMS = ["mxfp4", "fp8_block", "fp8_rows", "fp8_whole", "awq", "packed", "nvfp4", "nvfp4_packed"]


def save_mxfp4(folder: Path) -> None:
    """A gpt-oss whose experts are random bits of MXFP4."""
    torch.manual_seed(1)
    make_model("gpt_oss", intermediate_size=64, head_dim=128).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(0, 256, (num_experts, outputs, inputs // 32, 16))
        stored[f"{name}_blocks"] = blocks.byte()
        stored[f"{name}_scales"] = torch.randint(121, 125, blocks.shape[:-1]).byte()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    fields = {**config, "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(fields))


def save(form: str, folder: Path) -> None:
    if form == "mxfp4":
        save_mxfp4(folder)
    elif form == "fp8_block":
        save_in_blocks(make_model("qwen3_moe", **FP8_SIZES), folder)
    else:
        makers: dict[str, Any] = {
            "awq": (awq, AWQ),
            "gptq": (gptq, GPTQ),
            "packed": (packed, PACKED),
            "fp8_rows": (float_rows, FLOAT_ROWS),
            "fp8_whole": (float_whole, FLOAT_WHOLE),
            "nvfp4": (nvfp4_modelopt, NVFP4_MODELOPT),
            "nvfp4_packed": (nvfp4_packed, NVFP4_PACKED),
        }
        save_integers(make_model("qwen3_moe", head_dim=128), folder, *makers[form])
    PreTrainedTokenizerFast(tokenizer_object=make_backend()).save_pretrained(folder)


def options(folder: Path, *, resident: bool = False, **changes: Any) -> Options:
    """With a budget for KV and experts; or, `resident`, none."""
    sizes = {"device": "cpu", "max_model_len": 64, **changes}
    return Options.of(model=str(folder), **({} if resident else {"hot_gib": 0.02}), **sizes)


def save_wide(folder: Path) -> None:
    """The same model with plain weights, as it is read without tiers."""
    wide = load_model(str(folder / "model"), device="cpu", dtype="float32")
    wide.model.save_pretrained(folder / "wide")
    wide.tokenizer.save_pretrained(folder / "wide")


def answers(folder: Path, **changes: Any) -> list[list[int]]:
    engine, _ = load_engine(options(folder, **changes))
    try:
        return run(engine, PROMPTS)
    finally:
        engine.close()


@pytest.mark.parametrize("form", FORMS)
def test_host_memory_has_the_bytes_of_the_files_and_the_values_of_wide_experts(
    form: str, tmp_path: Path
) -> None:
    save(form, tmp_path)
    expected = load_model(str(tmp_path), device="cpu", dtype="float32").model
    config = json.loads((tmp_path / "config.json").read_text())
    engine, loaded = load_engine(options(tmp_path, expert_slots=1))

    for layer, wide in zip(experts_layers(loaded.model), experts_layers(expected), strict=True):
        source = layer.source
        assert isinstance(source, HostExperts) and source.narrow is not None
        assert source.rows.num_bytes == layer.num_experts * source.narrow.payload_bytes
        assert wide.weights is not None
        for got, weight in zip(source.matrices(), wide.weights, strict=True):
            assert torch.equal(got.mT if wide.is_transposed else got, weight)
    assert engine.experts is not None
    sizes = engine.experts.sizes
    assert engine.experts.host_bytes == sizes.num_layers * sizes.num_experts * sizes.cold_bytes
    narrow = engine.experts.narrow
    assert narrow is not None and f"in host memory as {narrow.name}" in engine.report
    assert f"weights: experts are kept as {narrow.name}" in engine.report
    num_bytes = sum(narrow.form.num_bytes(matrix.shape) for matrix in narrow.matrices)
    planned = shape_from_config(config, "tiny")
    if form in ("mxfp4", "packed"):  # others have sizes or groups that the planner has no row for
        biases = 4 * planned.moe_layers[0].expert.vector
        assert planned.expert_bytes_each - biases == num_bytes
    assert num_bytes <= narrow.weight_bytes <= num_bytes + 6 * 128
    engine.close()


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_answers_the_same_wherever_narrow_experts_are(form: str, tmp_path: Path) -> None:
    save(form, tmp_path / "model")
    save_wide(tmp_path)
    expected = answers(tmp_path / "wide")
    for changes in (
        {"expert_slots": 2, "expert_plan": "cache"},
        {"expert_slots": 1, "expert_plan": "stream"},
        {},  # all moved to the device, as there is room
    ):
        assert answers(tmp_path / "model", **changes) == expected, changes


@pytest.mark.parametrize("form", ["mxfp4", "fp8_block"])
def test_the_disk_has_narrow_experts_too_and_a_restart_answers_the_same(
    form: str, tmp_path: Path
) -> None:
    save(form, tmp_path / "model")
    save_wide(tmp_path)
    expected = answers(tmp_path / "wide")
    changes: dict[str, Any] = {"expert_slots": 1, "expert_disk_path": str(tmp_path / "disk")}
    for _ in range(2):
        engine, loaded = load_engine(
            options(tmp_path / "model", expert_host_gib=3.5 * payload(tmp_path) / GIB, **changes)
        )
        source = experts_layers(loaded.model)[0].source
        assert isinstance(source, DiskExperts) and source.narrow is not None
        store: ExpertStore = source.store
        assert store.payload_bytes == source.narrow.payload_bytes
        assert store.disk_bytes == store.num_layers * store.num_experts * store.payload_bytes
        assert run(engine, PROMPTS) == expected
        assert f"on disk, {store.folder} as {source.narrow.name}" in engine.report
        engine.close()


def payload(folder: Path) -> int:
    engine, loaded = load_engine(options(folder / "model", expert_slots=1))
    num_bytes = experts_layers(loaded.model)[0].source.payload_bytes
    engine.close()
    return num_bytes


def test_columns_of_a_group_that_are_apart_are_dequantised(tmp_path: Path) -> None:
    save("gptq", tmp_path)
    expected = answers(tmp_path, allow_widening=True)
    engine, loaded = load_engine(options(tmp_path, expert_slots=1, allow_widening=True))
    assert experts_layers(loaded.model)[0].source.narrow is None
    assert run(engine, PROMPTS) == expected
    engine.close()


@pytest.mark.parametrize("form", ["mxfp4", "fp8_block"])
def test_what_is_no_number_is_refused_by_name(form: str, tmp_path: Path) -> None:
    save(form, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if form == "mxfp4":
        name = "model.layers.1.mlp.experts.down_proj"
        stored[f"{name}_scales"][2, 3, 0] = 255
    else:
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        stored[name].view(torch.uint8)[5, 7] = 255
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} has codes or scales that are no numbers"):
        load_engine(options(tmp_path, expert_slots=1))


@pytest.mark.slow
def test_experts_that_all_stay_on_the_device_keep_the_bytes_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: kernels widen them, here in Triton's interpreter."""
    save("mxfp4", tmp_path / "model")
    save_wide(tmp_path)
    few: dict[str, Any] = {"max_num_batched_tokens": 8, "max_num_seqs": 2, "resident": True}
    prompts = PROMPTS[:1]
    engine, _ = load_engine(options(tmp_path / "wide", **few))
    expected = run(engine, prompts, max_tokens=3)
    engine.close()
    monkeypatch.setattr(hosting, "check_narrow_kernels", lambda *_: None)  # it is tried elsewhere
    for module in (hosting, loader, sizes):
        monkeypatch.setattr(module, "slots_hold", lambda experts, narrow, device: narrow)
    engine, loaded = load_engine(options(tmp_path / "model", **few))
    layers = experts_layers(loaded.model)
    for each in layers:
        assert isinstance(each.state, Narrow) and each.weights is None and each.hosted is None
    assert engine.experts is None
    num_bytes = sum(each.num_bytes() for each in layers)
    assert engine.sizes.weights_bytes == weights_bytes(loaded.model) > num_bytes
    assert "layers resident as mxfp4" in engine.report
    assert run(engine, prompts, max_tokens=3) == expected
    engine.close()


def test_random_experts_have_the_format_of_the_config(tmp_path: Path) -> None:
    save_mxfp4(tmp_path)
    made = load_dummy(str(tmp_path), device="cpu", dtype="float32", experts_on_host=True).model
    for experts in experts_layers(made):
        source = experts.source
        assert isinstance(source, HostExperts) and source.narrow is not None
        assert source.narrow.form == MXFP4
        for matrix in source.matrices():
            assert 0.01 < float(matrix.std()) < 0.04
    wide = load_dummy(str(tmp_path), device="cpu", dtype="float32").model
    assert all(experts.narrow is None for experts in experts_layers(wide))


def test_experts_that_cannot_stay_narrow_are_widened_only_where_that_is_allowed(
    tmp_path: Path,
) -> None:
    save("gptq", tmp_path)  # with `desc_act`: its columns are in another order
    changes: dict[str, Any] = {"expert_slots": 2}
    with pytest.raises(ModelError) as error:
        load_engine(options(tmp_path, **changes))
    said = str(error.value)
    assert re.search(r"such as model\.layers\.0\.mlp\.experts\.0\.\S+ with [\d,]+ bytes", said)
    assert "only read to be widened" in said and "give allow_widening" in said
    engine, _ = load_engine(options(tmp_path, **changes, allow_widening=True))
    assert "widened to float32 as they are read" in engine.report
    engine.close()
    alone, _ = load_engine(options(tmp_path, resident=True))  # a CPU alone widens all there are
    alone.close()
