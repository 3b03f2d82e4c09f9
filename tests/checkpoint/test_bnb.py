"""Checkpoints of bitsandbytes in 4 bits: read by hand, kept narrow, and refused by name."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fp8_blocks import expected_model, logits
from test_int_groups import Tensors, edit_config, save
from tiny_models import make_model

from hotset.checkpoint import bnb
from hotset.checkpoint.tensors import CheckpointTensors
from hotset.cost.params import name_of
from hotset.cost.quantisation import stored_format
from hotset.errors import ModelError
from hotset.linear.quant_linear import QuantLinear
from hotset.model import checkpoint, weights
from hotset.model.loader import load_model
from hotset.model.narrow_linears import narrow_bytes
from hotset.weight_format import NF4

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# Quantiles of a normal distribution: arXiv 2305.14314, appendix E.
NUMBERS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def nf4(layer: str, weight: torch.Tensor, *, nested: bool = False) -> tuple[Tensors, torch.Tensor]:
    """What bitsandbytes stores, and the weight that it reads from that."""
    runs = weight.float().reshape(-1, 64)
    scales = runs.abs().amax(1)
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape),
    }  # fmt: skip
    name, stored = f"{layer}.weight", {}
    if nested:
        offset, table = float(scales.mean()), torch.linspace(-1, 1, 256)
        apart = scales - offset
        largest = torch.stack([each.abs().max() for each in apart.split(256)])
        spread = largest.repeat_interleave(256)[: len(apart)]
        places = ((apart / spread).unsqueeze(1) - table).abs().argmin(1)
        scales = table[places] * spread + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        stored = {f"{name}.nested_absmax": largest, f"{name}.nested_quant_map": table}
    codes = ((runs / scales.unsqueeze(1)).unsqueeze(2) - NUMBERS).abs().argmin(2)
    flat = codes.reshape(-1, 2).byte()
    stored |= {
        name: (flat[:, 0] << 4 | flat[:, 1]).unsqueeze(1),  # the higher half first
        f"{name}.absmax": places.byte() if nested else scales,
        f"{name}.quant_map": NUMBERS.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()),
                                                               dtype=torch.uint8),
    }  # fmt: skip
    return stored, (NUMBERS[codes] * scales.unsqueeze(1)).view(weight.shape)


MAKERS = {"nf4": nf4, "nested": functools.partial(nf4, nested=True)}


def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on a GPU."""
    monkeypatch.setattr(weights, "narrow_form", lambda tensors, *_: tensors.narrow_format)
    architecture = checkpoint.read_architecture(folder)
    tensors = CheckpointTensors(folder, architecture.fields)
    architecture.config.__dict__.pop("quantization_config", None)
    model = weights.load_in_place(
        architecture, tensors, torch.device("cpu"), torch.float32, fp8=False
    )
    assert model is not None
    return model.eval()


@pytest.mark.parametrize("kind", MAKERS)
def test_weights_are_those_that_bitsandbytes_reads(kind: str, tmp_path: Path) -> None:
    wide = save(make_model("llama", **SIZES), tmp_path, MAKERS[kind], CONFIG)
    expected = expected_model(tmp_path, wide)
    loaded = load_model(str(tmp_path), device="cpu", dtype="float32")
    for name, weight in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    assert any("bitsandbytes" in note and "widened" in note for note in loaded.notes)


@pytest.mark.parametrize("kind", MAKERS)
def test_layers_keep_codes_and_opened_scales(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save(make_model("llama", **SIZES), tmp_path, MAKERS[kind], CONFIG)
    expected = expected_model(tmp_path, wide)
    model = load(tmp_path, monkeypatch)
    layers = {id(m): m for m in model.modules() if isinstance(m, QuantLinear)}.values()
    assert len(layers) == 4 * model.config.num_hidden_layers  # q, k, v and gate, up are merged
    planned = sum(NF4.num_bytes(layer.matrix.shape) for layer in layers)
    aligned = 3 * 128 * len(layers)
    assert planned <= narrow_bytes(model) <= planned + aligned
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    down = model.model.layers[0].mlp.down_proj
    assert torch.equal(down.weight, expected.model.layers[0].mlp.down_proj.weight)


def test_the_planner_counts_what_is_stored() -> None:
    assert stored_format(CONFIG) == NF4 and name_of(NF4) == "nf4" and NF4.bits() == 4.5
    assert stored_format({**CONFIG, "bnb_4bit_quant_storage": "bfloat16"}) is None


@pytest.mark.parametrize(
    ("part", "tensor", "expected"),
    [
        ("absmax", None, "absmax is missing, expected F32"),
        ("absmax", torch.zeros(3), r"absmax is F32 \[3\], expected F32 with"),
        ("quant_map", torch.zeros(8), r"quant_map is F32 \[8\], expected F32 with 16 numbers"),
        ("quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8), "quant_state is not"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    part: str, tensor: torch.Tensor | None, expected: str, tmp_path: Path
) -> None:
    save(make_model("llama", **SIZES), tmp_path, nf4, CONFIG)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    name = f"model.layers.0.self_attn.q_proj.weight.{part}"
    del stored[name]
    if tensor is not None:
        stored[name] = tensor
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=expected):
        load_model(str(tmp_path), device="cpu", dtype="float32")


def test_blocks_that_do_not_end_with_rows_are_widened() -> None:
    one = bnb.State((8, 128), 64, None, 0.0)
    assert bnb.format_of({"a": one}) == NF4
    assert bnb.format_of({"a": one, "b": replace(one, shape=(8, 96))}) is None
    assert bnb.format_of({"a": one, "b": replace(one, block=128)}) is None


def test_other_forms_of_bitsandbytes_still_need_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(make_model("llama", **SIZES), tmp_path, nf4, CONFIG)
    edit_config(tmp_path, quantization_config={**CONFIG, "bnb_4bit_quant_storage": "bfloat16"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(str(tmp_path), device="cpu", dtype="float32")
