"""Checkpoints in 8-bit blocks: dequantised as by hand, whatever the shape; what is odd is refused.

The block is DeepSeek-V3's 128 x 128, of which few sizes here are a multiple.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import give_slots
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from hotset.checkpoint import fp8_blocks
from hotset.checkpoint.fp8_blocks import dequantise
from hotset.errors import ModelError
from hotset.experts.disk import DiskExperts, ExpertSink
from hotset.experts.gating import use_dynamic_gating
from hotset.experts.weights import Narrow, experts_layers, experts_of
from hotset.linear.merged import MergedLinear
from hotset.model import checkpoint
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.units import GIB

Tensors = dict[str, torch.Tensor]
TOKENS = torch.arange(3, 30).unsqueeze(0)
BLOCK = 128


def to_blocks(weight: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit floats and their scales, by loops: what `dequantise` is checked against."""
    rows, columns = weight.shape
    narrow = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block), -(-columns // block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (
                slice(i * block, min((i + 1) * block, rows)),
                slice(j * block, min((j + 1) * block, columns)),
            )
            scales[i, j] = weight[part].abs().max() / 448
            narrow[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return narrow, scales


def from_blocks(narrow: torch.Tensor, scales: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    out = narrow.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            out[i * block : (i + 1) * block, j * block : (j + 1) * block] *= scales[i, j]
    return out


def is_narrow(name: str) -> bool:
    """DeepSeek-V3 leaves embeddings, head, norms and routers as they are."""
    return name.endswith("weight") and ("proj" in name or "_a_" in name) and "norm" not in name


def save_in_blocks(model: Any, folder: Path, **quantization: Any) -> Tensors:
    """Save a model in 8-bit blocks; what its tensors are when read back, by name."""
    model.save_pretrained(folder)
    stored, wide = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if is_narrow(name):
            stored[name], scales = to_blocks(tensor)
            stored[f"{name}_scale_inv"] = scales
            wide[name] = from_blocks(stored[name], scales)
        else:
            stored[name] = wide[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    fields = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], **quantization}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))
    return wide


def expected_model(folder: Path, wide: Tensors) -> Any:
    """What transformers makes of the tensors as they are read back, without any quantisation."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return architecture.from_pretrained(
        None, config=config, state_dict=wide, dtype=torch.float32
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(TOKENS, use_cache=False).logits
    return out


DEEPSEEK = {"qk_rope_head_dim": 64, "head_dim": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"kv_lora_rank": 128, **DEEPSEEK}),  # 192 rows: 2 blocks, not of 96
        ("deepseek_v3", {"kv_lora_rank": 512, **DEEPSEEK}),  # 576 rows, as the real one has
        ("qwen3_moe", {"hidden_size": 192, "moe_intermediate_size": 448}),
        ("llama", {"hidden_size": 192, "intermediate_size": 320}),
        ("llama", {"hidden_size": 256, "intermediate_size": 512}),
    ],
)
def test_blocks_are_read_as_by_hand(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    wide = save_in_blocks(make_model(family, **changes), tmp_path)
    expected = expected_model(tmp_path, wide)

    loaded = load_model(str(tmp_path), device="cpu", dtype="float32").model

    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    torch.testing.assert_close(logits(loaded), logits(expected))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_blocks_are_rounded_again_for_8_bit_products(family: str, tmp_path: Path) -> None:
    changes = {"hidden_size": 192, "intermediate_size": 320}
    wide = save_in_blocks(make_model(family, **changes), tmp_path)
    expected = expected_model(tmp_path, wide)
    expected.save_pretrained(tmp_path / "plain")
    cpu = torch.device("cpu")

    def load(folder: Path) -> Any:
        architecture = checkpoint.read_architecture(folder)
        return checkpoint.load_folder(folder, architecture, cpu, torch.float32, fp8=True)

    loaded, plain = load(tmp_path), load(tmp_path / "plain")

    torch.testing.assert_close(logits(loaded), logits(plain))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3_moe"])
def test_blocks_are_dequantised_on_a_gpu(family: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"hidden_size": 192}
    if family == "deepseek_v3":
        changes = {"kv_lora_rank": 512, **DEEPSEEK}
    wide = save_in_blocks(make_model(family, **changes), tmp_path)
    expected = expected_model(tmp_path, wide).to(torch.bfloat16).state_dict()

    model = load_model(str(tmp_path), device="cuda", dtype="bfloat16").model

    for name, tensor in expected.items():
        path, _, last = name.rpartition(".")
        layer, rows = model.get_submodule(path), slice(None)
        if isinstance(layer, MergedLinear):
            layer, rows = layer.whole, layer.columns
        found = getattr(layer, last)
        if found is None:  # experts, which stay in 8 bits
            state = experts_of(layer).state
            assert isinstance(state, Narrow) and state.payloads.is_cuda
            found = state.narrow.widen(int(last == "down_proj"), state.payloads, tensor.dtype)
        assert found.is_cuda and torch.equal(found[rows].cpu().to(tensor.dtype), tensor), name


def test_one_scale_for_a_weight_and_inputs_that_were_scaled(tmp_path: Path) -> None:
    model = make_model("llama", num_hidden_layers=1)
    save_in_blocks(model, tmp_path, weight_block_size=None, activation_scheme="static")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = tensors[name].reshape(())
        tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.25)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = load_model(str(tmp_path), device="cpu", dtype="float32").model

    name = "model.layers.0.mlp.up_proj.weight"
    expected = tensors[name].float() * tensors[f"{name}_scale_inv"]
    assert torch.equal(loaded.state_dict()[name], expected)


def test_stacked_experts_with_one_scale_each(tmp_path: Path) -> None:
    model = make_model("qwen3_moe", num_hidden_layers=1)
    save_in_blocks(model, tmp_path, weight_block_size=None, activation_scheme="static")
    tensors = load_file(tmp_path / "model.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in [name for name in plain if name.endswith("_scale_inv")]:
        plain[name] = plain[name].reshape(())
    expected = {}
    for name in ("gate_up_proj", "down_proj"):
        stem = f"model.layers.0.mlp.experts.{name}"
        weight = model.state_dict()[stem]
        scales = weight.abs().amax((1, 2), keepdim=True) / 448
        plain[stem] = (weight / scales).to(torch.float8_e4m3fn)
        plain[f"{stem}_scale_inv"] = scales if name == "down_proj" else scales.flatten()
        plain[f"{stem}_activation_scale"] = torch.ones(8)
        expected[stem] = plain[stem].float() * scales
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = load_model(str(tmp_path), device="cpu", dtype="float32").model.state_dict()

    assert all(torch.equal(loaded[stem], expected[stem]) for stem in expected)


@pytest.mark.parametrize("piece_values", [1, 64 * 129, 2**22])
def test_pieces_do_not_show(piece_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_blocks, "_PIECE_VALUES", piece_values)
    narrow = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2)
    as_is = {"dtype": torch.float32}
    wide = dequantise(narrow, scales, block=(BLOCK, BLOCK), **as_is)
    assert torch.equal(wide, from_blocks(narrow, scales))
    rows = torch.rand(300, 1)
    assert torch.equal(dequantise(narrow, rows, block=(1, None), **as_is), narrow.float() * rows)
    one = torch.rand(1, 1)
    assert torch.equal(dequantise(narrow, one, block=None, **as_is), narrow.float() * one)
    stacked = dequantise(torch.stack((narrow, narrow)), one, block=None, **as_is)
    assert torch.equal(stacked[1], narrow.float() * one)


def test_scales_may_be_powers_of_two_and_weights_stacked() -> None:
    narrow = torch.randn(3, 192, 64).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (3, 2, 1), dtype=torch.uint8)
    scales = (exponents.float() - 127).exp2()
    expected = torch.stack([from_blocks(*pair) for pair in zip(narrow, scales, strict=True)])

    block = (BLOCK, BLOCK)
    for stored in (exponents, scales, scales.to(torch.float8_e8m0fnu)):
        assert torch.equal(dequantise(narrow, stored, block=block, dtype=torch.float32), expected)


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("no scales", r"a weight as F8_E4M3 without its scales, .*q_proj.weight_scale_inv"),
        ("short scales", r"q_proj.weight_scale_inv is F32 \[1, 1\], expected \[2, 2\]"),
        ("packed", r"q_proj.weight is stored as I8, which no FP8 checkpoint"),
        ("scales of a wide weight", r"no place in it, first .*q_proj.weight_scale_inv"),
        ("odd block", r"weight_block_size is \[128\], expected two whole numbers"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    change: str, expected: str, dtype: str, tmp_path: Path
) -> None:
    block = [128] if change == "odd block" else [BLOCK, BLOCK]
    model = make_model("llama", hidden_size=192, num_hidden_layers=1, num_attention_heads=12)
    save_in_blocks(model, tmp_path, weight_block_size=block)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    if change == "no scales":
        del tensors[f"{name}_scale_inv"]
    elif change == "short scales":
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    elif change == "packed":
        tensors[name] = torch.zeros(192, 96, dtype=torch.int8)
    elif change == "scales of a wide weight":
        tensors[name] = tensors[name].float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=expected) as caught:
        load_model(str(tmp_path), device="cpu", dtype=dtype)
    assert "\n" not in str(caught.value)


def test_experts_in_blocks_go_to_disk_while_they_are_loaded(tmp_path: Path) -> None:
    changes = {"hidden_size": 192, "moe_intermediate_size": 160}
    folder = tmp_path / "model"
    wide = save_in_blocks(make_model("qwen3_moe", **changes), folder)
    expected = expected_model(folder, wide)
    layout = experts_layers(expected)[0].layout
    config = Options.of(
        expert_slots=2,
        expert_host_gib=4 * layout.payload_bytes / GIB,
        expert_disk_path=tmp_path / "disk",
    )

    loaded = load_model(
        str(folder),
        device="cpu",
        dtype="float32",
        experts_on_host=True,
        experts=ExpertSink(config.experts, read_deadline_s=60.0),
    )

    hosted = [experts.hosted for experts in experts_layers(loaded.model)]
    assert len(hosted) == 3
    assert all(each is not None and isinstance(each.source, DiskExperts) for each in hosted)
    use_dynamic_gating(loaded.model)
    buffer, _ = give_slots(loaded.model, config)
    assert buffer is not None
    torch.testing.assert_close(logits(loaded.model), logits(expected))
    buffer.close(with_disk=True)
