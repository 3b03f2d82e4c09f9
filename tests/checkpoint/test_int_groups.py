"""Checkpoints of small integers, and of compressed-tensors: dequantised as by hand, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fp8_blocks import expected_model, is_narrow, logits
from tiny_models import make_model

from hotset.checkpoint import nvfp4 as nvfp4_reader
from hotset.errors import ModelError
from hotset.experts.narrow import NarrowLayout
from hotset.model import checkpoint
from hotset.model.loader import load_model
from hotset.weight_format import NVFP4

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def rounded(weight: torch.Tensor, bits: int, *, symmetric: bool) -> list[torch.Tensor]:
    """`[N, K]` codes, `[N, G]` zeros and float16 scales of groups, by loops."""
    num_groups = -(-weight.shape[1] // GROUP)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    zeros = torch.zeros(len(weight), num_groups, dtype=torch.int64)
    scales = torch.zeros(len(weight), num_groups, dtype=torch.float16)
    most = 2**bits - 1
    for i, row in enumerate(weight.float()):
        for j in range(num_groups):
            part = row[j * GROUP : (j + 1) * GROUP]
            low, high = (-part.abs().max(), part.abs().max()) if symmetric else part.aminmax()
            scales[i, j] = scale = ((high - low) / most).half()
            zeros[i, j] = zero = 2 ** (bits - 1) if symmetric else int((-low / scale).round())
            codes[i, j * GROUP : (j + 1) * GROUP] = (part / scale + zero).round().clamp(0, most)
    return [codes, zeros, scales]


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """`[R, C]` codes to int32, which has those of a few neighbours in a row, one after another."""
    per_word = 32 // bits
    out = torch.zeros(len(codes), codes.shape[1] // per_word, dtype=torch.int64)
    for place in range(per_word):
        column = place if order is None else order[place]
        out |= codes[:, column::per_word] << place * bits
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def awq(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, zeros, scales = rounded(weight, 4, symmetric=False)
    stored = {
        f"{layer}.qweight": words(codes.t(), 4, AWQ_ORDER),
        f"{layer}.qzeros": words(zeros.t(), 4, AWQ_ORDER),
        f"{layer}.scales": scales.t().contiguous(),
    }
    return stored, wide(codes, zeros, scales)


def gptq(layer: str, weight: torch.Tensor, bits: int = 4) -> tuple[Tensors, torch.Tensor]:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    codes, zeros, scales = rounded(weight[:, order], bits, symmetric=True)
    back = order.argsort()  # a column's place among those that share scales
    stored = {
        f"{layer}.qweight": words(codes[:, back], bits).t().contiguous(),
        f"{layer}.qzeros": words(zeros.t() - 1, bits),
        f"{layer}.scales": scales.t().contiguous(),
        f"{layer}.g_idx": (back // GROUP).to(torch.int32),
        f"{layer}.bias": torch.zeros(len(weight), dtype=torch.float16),
    }
    return stored, wide(codes, zeros, scales)[:, back]


def gptq_8(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return gptq(layer, weight, 8)


def packed(
    layer: str, weight: torch.Tensor, symmetric: bool = True
) -> tuple[Tensors, torch.Tensor]:
    codes, zeros, scales = rounded(weight, 4, symmetric=symmetric)
    stored = {
        f"{layer}.weight_packed": words(codes, 4),
        f"{layer}.weight_scale": scales,
        f"{layer}.weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored[f"{layer}.weight_zero_point"] = words(zeros.t(), 4).t().contiguous()
    return stored, wide(codes, zeros, scales)


def packed_with_zeros(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return packed(layer, weight, symmetric=False)


def narrow(
    dtype: torch.dtype, rows: int, layer: str, weight: torch.Tensor
) -> tuple[Tensors, torch.Tensor]:
    most = 448.0 if dtype.is_floating_point else 127.0
    scale = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max().reshape(1)
    scale = (scale / most).bfloat16()
    values = weight / scale.float()
    values = (values if dtype.is_floating_point else values.round()).clamp(-most, most).to(dtype)
    stored = {f"{layer}.weight": values, f"{layer}.weight_scale": scale}
    return stored, values.float() * scale.float()


def float_rows(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return narrow(torch.float8_e4m3fn, 1, layer, weight)


def float_whole(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored, expected = narrow(torch.float8_e4m3fn, 0, layer, weight)
    return stored | {f"{layer}.input_scale": torch.ones(1)}, expected


def int_rows(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return narrow(torch.int8, 1, layer, weight)


def nvfp4(layer: str, weight: torch.Tensor, *, is_packed: bool) -> tuple[Tensors, torch.Tensor]:
    """Random bits, with a factor of the layer's own."""
    rows, columns = weight.shape
    codes = torch.randint(0, 256, (rows, columns // 2)).byte()
    scales = (1 + 15 * torch.rand(rows, columns // 16)).to(torch.float8_e4m3fn)
    factor = torch.rand(1) * 1e-2 + 1e-3
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    numbers = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], -1).flatten(1)
    wide = numbers * scales.float().repeat_interleave(16, -1)
    if is_packed:
        whole = 1 / factor
        stored = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": whole}
        more, wide = {"input_global_scale": torch.ones(1)}, wide * (1 / whole)
    else:
        whole = factor.reshape(())
        stored = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
        more, wide = {"input_scale": torch.ones(())}, wide * whole
    return {f"{layer}.{name}": part for name, part in (stored | more).items()}, wide


def nvfp4_packed(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return nvfp4(layer, weight, is_packed=True)


def nvfp4_modelopt(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return nvfp4(layer, weight, is_packed=False)


def wide(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    groups = torch.arange(codes.shape[1]) // GROUP
    return (codes - zeros[:, groups]).float() * scales[:, groups].float()


def compressed(form: str, kind: str, strategy: str, bits: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True}
PACKED = compressed("pack-quantized", "int", "group", 4, group_size=GROUP)
NVFP4_PACKED = compressed("nvfp4-pack-quantized", "float", "tensor_group", 4, group_size=16)
NVFP4_MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
FLOAT_ROWS = compressed("float-quantized", "float", "channel", 8)
FLOAT_WHOLE = compressed("float-quantized", "float", "tensor", 8)
FORMS: list[tuple[Callable[..., tuple[Tensors, torch.Tensor]], dict[str, Any]]] = [
    (awq, AWQ),
    (gptq, GPTQ),
    (gptq_8, {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}),
    (packed, PACKED),
    (
        packed_with_zeros,
        compressed("pack-quantized", "int", "group", 4, group_size=GROUP, symmetric=False),
    ),
    (float_rows, FLOAT_ROWS),
    (float_whole, FLOAT_WHOLE),
    (nvfp4_packed, NVFP4_PACKED),
    (nvfp4_modelopt, NVFP4_MODELOPT),
    (int_rows, compressed("int-quantized", "int", "channel", 8)),
]


def save(model: Any, folder: Path, make: Any, config: dict[str, Any]) -> Tensors:
    """Save a model's linear layers so; what its tensors are when read back, by name."""
    model.save_pretrained(folder)
    stored, expected = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if is_narrow(name):
            parts, expected[name] = make(name.removesuffix(".weight"), tensor)
            stored |= parts
        else:
            stored[name] = expected[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=config)
    return expected


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(("make", "config"), FORMS, ids=[make.__name__ for make, _ in FORMS])
def test_weights_are_read_as_by_hand_and_need_no_package(
    make: Any, config: dict[str, Any], family: str, tmp_path: Path
) -> None:
    expected = expected_model(tmp_path, save(make_model(family), tmp_path, make, config))

    loaded = load_model(str(tmp_path), device="cpu", dtype="float32").model

    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    torch.testing.assert_close(logits(loaded), logits(expected))


@pytest.mark.parametrize(("make", "config"), FORMS[:4], ids=[f[0].__name__ for f in FORMS[:4]])
def test_they_go_straight_to_their_place_where_layers_are_merged(
    make: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    expected = expected_model(tmp_path, save(make_model("llama"), tmp_path, make, config))
    expected.save_pretrained(tmp_path / "plain")

    def load(folder: Path) -> Any:
        architecture = checkpoint.read_architecture(folder)
        cpu = torch.device("cpu")
        return checkpoint.load_folder(folder, architecture, cpu, torch.float32, fp8=True)

    torch.testing.assert_close(logits(load(tmp_path)), logits(load(tmp_path / "plain")))


def test_parts_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    save(make_model("llama"), tmp_path, awq, AWQ)
    edit_config(tmp_path, quantization_config={**AWQ, "group_size": 64})
    with pytest.raises(ModelError, match=r"scales is \[3, 64\], expected \[2, 64\] for 4-bit"):
        load_model(str(tmp_path), device="cpu", dtype="float32")
    edit_config(tmp_path, quantization_config=AWQ)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.qzeros"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.qzeros is missing"):
        load_model(str(tmp_path), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "config",
    [
        {**AWQ, "version": "gemv"},
        {**AWQ, "bits": 3},
        {**AWQ, "zero_point": False},
        {**GPTQ, "sym": False},
        {**GPTQ, "checkpoint_format": "marlin"},
        {**GPTQ, "dynamic": {"-:lm_head": {}}},
        {**GPTQ, "rotation": "hadamard"},
        {**PACKED, "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        {**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}},
        compressed("pack-quantized", "int", "group", 4, group_size=GROUP, actorder="group"),
        compressed("nvfp4-pack-quantized", "float", "tensor_group", 4, group_size=32),
        compressed("int-quantized", "int", "channel", 8, symmetric=False),
    ],
    ids=str,
)
def test_other_forms_are_left_to_their_package(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    make_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(ModelError, match="need the package"):
        load_model(str(tmp_path), device="cpu", dtype="float32")


def test_nvfp4_is_read_as_its_specification_says() -> None:
    """Golden values: all codes, under the scales 1.5 and 2**-9, and a factor that is not 1."""
    codes = torch.arange(16).byte()
    packed = torch.cat([codes[::2] | codes[1::2] << 4] * 2).view(1, 16)
    scales = torch.tensor([[0x3C, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers += [-number for number in numbers]
    expected = torch.tensor([[n * 1.5 * 0.25 for n in numbers] + [n * 2**-11 for n in numbers]])
    for kind, factor in (("modelopt", 0.25), ("packed", 4.0)):
        parts = packed, scales, torch.tensor(factor)
        got = nvfp4_reader.dequantise(*parts, kind=kind, dtype=torch.float32)
        assert torch.equal(got, expected)
        layout = NarrowLayout((1, 1, 32), (1, 32), NVFP4)
        payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8)
        for which in (0, 1):
            layout.write(which, 0, payload, nvfp4_reader.planes(*parts, kind=kind))
        for matrix in layout.dequantise(payload.unsqueeze(0), torch.float32):
            assert torch.equal(matrix[0], expected)


def test_nvfp4_without_its_factor_is_refused_by_name(tmp_path: Path) -> None:
    save(make_model("llama"), tmp_path, nvfp4_modelopt, NVFP4_MODELOPT)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_2"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight_scale_2 is missing, expected F32"):
        load_model(str(tmp_path), device="cpu", dtype="float32")
