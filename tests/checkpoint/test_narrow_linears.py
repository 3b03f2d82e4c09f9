"""Linear layers of quantised checkpoints that stay in few bits: the widened model's, merged."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import test_int_groups
import torch
from safetensors.torch import load_file
from test_fp8_blocks import expected_model, logits, save_in_blocks
from test_int_groups import FORMS, GROUP, Tensors, compressed, rounded, save, wide, words
from tiny_models import make_model

from hotset.checkpoint.tensors import CheckpointTensors
from hotset.cost.layout import Layout
from hotset.errors import ModelError
from hotset.linear import quant_linear
from hotset.linear.eight_bit import reference_product
from hotset.linear.merged import MergedLinear
from hotset.linear.narrow_matrix import NarrowMatrix
from hotset.linear.quant_linear import QuantLinear
from hotset.model import checkpoint, narrow_linears, weights
from hotset.model.cut_model import ModelCutter
from hotset.model.narrow_linears import narrow_bytes, narrow_form, rounds_inputs
from hotset.parallel import group
from hotset.weight_format import AWQ_128, FP8_BLOCK, INT4_128

CPU = torch.device("cpu")


def packed_8(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, zeros, scales = rounded(weight, 8, symmetric=True)
    stored = {f"{layer}.weight_packed": words(codes, 8), f"{layer}.weight_scale": scales}
    return stored, wide(codes, zeros, scales)


KEPT = [form for form in FORMS if form[0].__name__ in ("awq", "packed", "packed_with_zeros")]
KEPT += [form for form in FORMS if form[0].__name__ in ("float_rows", "float_whole")]
KEPT += [form for form in FORMS if form[0].__name__.startswith("nvfp4")]
KEPT += [form for form in FORMS if form[0].__name__ == "int_rows"]
KEPT += [(packed_8, compressed("pack-quantized", "int", "group", 8, group_size=GROUP))]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have layers stay in few bits without a GPU: the CPU widens them in each product."""

    def form_of(tensors: CheckpointTensors, *_: Any) -> Any:
        form = tensors.narrow_format
        return None if form is None else replace(form, rows=form.rows or 1)

    monkeypatch.setattr(weights, "narrow_form", form_of)


def load(
    folder: Path, cutter: ModelCutter | None = None, *, input_bits: Literal[16, 8] = 16
) -> Any:
    architecture = checkpoint.read_architecture(folder)
    tensors = CheckpointTensors(folder, architecture.fields, input_bits=input_bits)
    architecture.config.__dict__.pop("quantization_config", None)
    model = weights.load_in_place(
        architecture, tensors, CPU, torch.float32, fp8=False, cutter=cutter
    )
    assert model is not None
    return model.eval()


def check(model: Any, expected: Any, num_merged: int) -> None:
    assert sum(isinstance(module, MergedLinear) for module in model.modules()) == num_merged
    for path, layer in expected.named_modules():
        if not path.endswith("proj"):
            continue
        narrow = model.get_submodule(path)
        if isinstance(narrow, MergedLinear):
            assert isinstance(narrow.whole, QuantLinear)
            weight = narrow.whole.weight[narrow.columns]
        else:
            assert isinstance(narrow, QuantLinear)
            weight = narrow.weight
        assert torch.equal(weight, layer.weight), path
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "config"), KEPT, ids=[make.__name__ for make, _ in KEPT])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_stay_as_the_files_have_them(
    make: Callable[..., tuple[Tensors, torch.Tensor]],
    config: dict[str, Any],
    family: str,
    tmp_path: Path,
    on_a_gpu: None,
) -> None:
    expected = expected_model(tmp_path, save(make_model(family), tmp_path, make, config))
    model = load(tmp_path)
    num_layers = model.config.num_hidden_layers
    check(model, expected, num_merged=5 * num_layers)
    stored = load_file(tmp_path / "model.safetensors")
    num_bytes = sum(t.nbytes for name, t in stored.items() if name.endswith("qweight"))
    num_bytes += sum(t.nbytes for name, t in stored.items() if name.endswith("weight_packed"))
    num_bytes += sum(t.nbytes for name, t in stored.items() if t.dtype == torch.uint8
                     and name.endswith(".weight"))  # fmt: skip
    eight_bits = (torch.float8_e4m3fn, torch.int8)
    num_bytes += sum(t.nbytes for t in stored.values() if t.dtype in eight_bits)
    assert num_bytes < narrow_bytes(model) < 1.4 * num_bytes  # groups of 32 have large scales


@pytest.mark.parametrize(
    ("sizes", "merged_per_layer"),
    [({"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}, 5),
     ({"hidden_size": 192, "intermediate_size": 320, "head_dim": 32}, 0)],
)  # fmt: skip
def test_blocks_are_merged_where_they_end_with_a_layer(
    sizes: dict[str, int], merged_per_layer: int, tmp_path: Path, on_a_gpu: None
) -> None:
    model = make_model("llama", **sizes, num_key_value_heads=2, num_attention_heads=2)
    expected = expected_model(tmp_path, save_in_blocks(model, tmp_path))
    loaded = load(tmp_path)
    check(loaded, expected, merged_per_layer * loaded.config.num_hidden_layers)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "form", ["blocks", *KEPT], ids=lambda form: getattr(form[0], "__name__", form)
)
def test_a_rank_keeps_its_part_as_the_files_have_it(
    form: Any, rank: int, tmp_path: Path, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
    if form == "blocks":
        wide = save_in_blocks(make_model("llama", **sizes), tmp_path)
    else:
        wide = save(make_model("llama", intermediate_size=128), tmp_path, *form)
    whole = expected_model(tmp_path, wide)
    monkeypatch.setattr(group, "_current", group.Group(rank, Layout(2), CPU, True))
    cutter = ModelCutter(whole, "tiny")
    expected = copy.deepcopy(whole)
    cutter.cut_all(expected)
    model = load(tmp_path, cutter)
    check(model, expected, num_merged=5 * model.config.num_hidden_layers)


def test_a_head_in_few_bits_is_widened_and_cut(
    tmp_path: Path, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        test_int_groups, "is_narrow", lambda name: name.endswith(("_proj.weight", "lm_head.weight"))
    )
    whole = expected_model(tmp_path, save(make_model("llama", vocab_size=128), tmp_path, *KEPT[0]))
    assert type(load(tmp_path).lm_head) is QuantLinear  # of one rank
    monkeypatch.setattr(group, "_current", group.Group(1, Layout(2), CPU, True))
    cutter = ModelCutter(whole, "tiny")
    model = load(tmp_path, cutter)
    cutter.join_outputs(model)
    assert torch.equal(model.lm_head.part.weight, whole.lm_head.weight[64:])


def test_blocks_that_end_within_a_part_are_widened(
    tmp_path: Path, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 128, "head_dim": 128}
    whole = expected_model(tmp_path, save_in_blocks(make_model("llama", **sizes), tmp_path))
    monkeypatch.setattr(group, "_current", group.Group(1, Layout(2), CPU, True))
    model = load(tmp_path, ModelCutter(whole, "tiny"))
    kept = {path.rpartition(".")[2] for path, m in model.named_modules() if type(m) is QuantLinear}
    assert kept == {"whole", "o_proj"}
    for layer, expected in zip(model.model.layers, whole.model.layers, strict=True):
        weight = layer.mlp.down_proj.weight
        assert torch.equal(weight, expected.mlp.down_proj.weight[:, 64:])


@pytest.mark.parametrize("save_as", ["blocks", "rows"])
def test_inputs_are_rounded_where_that_is_asked_for(
    save_as: str, tmp_path: Path, on_a_gpu: None
) -> None:
    model = make_model("llama", hidden_size=256, intermediate_size=512, head_dim=128,
                       num_key_value_heads=2, num_attention_heads=2)  # fmt: skip
    if save_as == "blocks":
        save_in_blocks(model, tmp_path)
    else:
        save(model, tmp_path, *next(form for form in FORMS if form[0].__name__ == "float_rows"))
    exact, rounded = load(tmp_path), load(tmp_path, input_bits=8)
    assert rounds_inputs(rounded) and not rounds_inputs(exact)
    assert narrow_bytes(rounded) == narrow_bytes(exact)
    layers = [module for module in rounded.modules() if isinstance(module, QuantLinear)]
    x = torch.randn(5, 256)
    expected = reference_product(x, layers[0].payload, layers[0].matrix)
    assert torch.equal(layers[0](x), expected)
    error = (expected - x @ layers[0].weight.t()).norm() / expected.norm()
    assert 1e-3 < error < 0.05  # 3 bits of mantissa, and no more than that
    assert not torch.equal(logits(rounded), logits(exact))


def test_inputs_of_other_weights_are_not_rounded(tmp_path: Path) -> None:
    save(make_model("llama"), tmp_path, *KEPT[0])
    with pytest.raises(ModelError, match="activations is 8, for weights in 8-bit floats, and its"):
        load(tmp_path, input_bits=8)


def test_scales_of_inputs_that_are_powers_of_2_are_refused(tmp_path: Path) -> None:
    save_in_blocks(make_model("llama"), tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"]["scale_fmt"] = "ue8m0"
    file.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="powers of 2"):
        load(tmp_path, input_bits=8)


def test_a_number_that_is_none_is_refused(tmp_path: Path, on_a_gpu: None) -> None:
    def spoilt(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        stored, wide = KEPT[0][0](layer, weight)
        stored[f"{layer}.scales"][0, 0] = torch.inf
        return stored, wide

    save(make_model("llama"), tmp_path, spoilt, KEPT[0][1])
    with pytest.raises(ModelError, match=r"q_proj\.weight|proj\.weight has codes or scales"):
        load(tmp_path)


def test_layers_stay_wide_without_a_gpu_and_in_float32(tmp_path: Path) -> None:
    save(make_model("llama"), tmp_path, *KEPT[0])
    architecture = checkpoint.read_architecture(tmp_path)
    tensors = CheckpointTensors(tmp_path, architecture.fields)
    assert tensors.narrow_format is not None
    assert narrow_form(tensors, CPU, torch.bfloat16) is None
    assert narrow_form(tensors, torch.device("cuda"), torch.float32) is None
    assert narrow_bytes(load(tmp_path)) == 0


def test_kernels_that_fail_their_trial_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(make_model("llama"), tmp_path, *KEPT[0])
    tensors = CheckpointTensors(tmp_path, checkpoint.read_architecture(tmp_path).fields)
    monkeypatch.setattr(narrow_linears.quant_linear, "check", lambda *_: "products are wrong by 9%")
    assert narrow_form(tensors, torch.device("cuda"), torch.bfloat16) is None
    assert "are widened, as this GPU's products are wrong by 9%" in caplog.text


@pytest.mark.parametrize("form", [FP8_BLOCK, INT4_128, AWQ_128], ids=lambda form: form.name)
def test_the_trial_finds_products_that_are_wrong(
    form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quant_linear.check(form, torch.bfloat16, CPU) is None
    right = NarrowMatrix.widened
    calls: list[None] = []

    def wrong(self: NarrowMatrix, payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        calls.append(None)
        return right(self, payload, dtype) * (1 if len(calls) == 1 else 1.02)

    monkeypatch.setattr(NarrowMatrix, "widened", wrong)
    assert "are wrong by 2." in str(quant_linear.check(form, torch.bfloat16, CPU))
