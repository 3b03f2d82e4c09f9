"""Checkpoints as people have them: read right, or refused with a line that names what they are."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_config, make_model

from hotset.checkpoint import files as checkpoint_files
from hotset.errors import ModelError
from hotset.model import checkpoint
from hotset.model.loader import load_model

Tensors = dict[str, torch.Tensor]
TOKENS = torch.arange(3, 30).unsqueeze(0)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own for each test."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def edit_weights(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(TOKENS, use_cache=False).logits
    return out


def assert_same(folder: Path, expected: Any) -> None:
    """The folder's model answers as `expected` does, loaded either way."""
    loaded = load_model(str(folder), device="cpu", dtype="float32").model
    torch.testing.assert_close(logits(loaded), logits(expected))


def load_8_bit(folder: Path) -> Any:
    """With linear layers rounded to 8 bits by row, straight to their place, as on a GPU."""
    architecture = checkpoint.read_architecture(folder)
    cpu = torch.device("cpu")
    return checkpoint.load_folder(folder, architecture, cpu, torch.float32, fp8=True)


def checkpoint_of(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def refusal(folder: Path, dtype: str = "float32") -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu", dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(word in message for word in ("above report", "ignore_mismatched_sizes"))
    return message


def to_modelopt_fp8(tensors: Tensors) -> Tensors:
    """Linear layers in 8 bits with one scale for each, as NVIDIA ModelOpt stores them."""
    stored = {}
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            stored[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale"] = scale
        stored[name.replace("weight", "input_scale")] = torch.tensor(0.5)
    return stored


def test_8_bit_weights_that_no_config_tells_of_are_refused(folder: Path) -> None:
    edit_weights(folder, to_modelopt_fp8)
    for dtype in ("float32", "fp8"):  # `fp8` is the path of GPUs
        message = refusal(folder, dtype)
        assert "narrow or packed (21, first model" in message and "as F8_E4M3" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_weight_that_is_stored_as_whole_numbers_is_refused(
    folder: Path, dtype: torch.dtype
) -> None:
    name = f"{Q_PROJ}.weight"
    edit_weights(folder, lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    assert f"narrow or packed (1, first {name}" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"num_hidden_layers": "2"}, "Validation error for field 'num_hidden_layers': TypeError"),
        ({"rope_scaling": {"type": "spiral"}}, "there is no 'spiral'"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(
    folder: Path, field: dict[str, Any], expected: str
) -> None:
    edit_config(folder, **field)
    assert expected in refusal(folder)


@pytest.mark.parametrize("where", ["config.json", "one level below", "hf_quant_config.json"])
def test_modelopt_fp8_is_read_wherever_it_says_so(folder: Path, where: str) -> None:
    expected = make_model("llama")
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            if name.endswith("proj.weight"):
                scale = weight.abs().max() / 448
                weight.copy_((weight / scale).to(torch.float8_e4m3fn).float() * scale)
    edit_weights(folder, to_modelopt_fp8)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None}
    if where == "hf_quant_config.json":
        (folder / where).write_text(json.dumps({"quantization": quantization}))
    elif where == "config.json":
        edit_config(folder, quantization_config={"quant_method": "modelopt", **quantization})
    else:
        nested = {"quant_method": "modelopt", "quantization": quantization}
        edit_config(folder, quantization_config=nested)

    assert_same(folder, expected)
    plain = checkpoint_of(expected, folder.parent / "plain")
    torch.testing.assert_close(logits(load_8_bit(folder)), logits(load_8_bit(plain)))


def test_autofp8_has_one_scale_for_each_weight_and_its_own_name_for_those_of_kv(
    folder: Path,
) -> None:
    def to_autofp8(tensors: Tensors) -> Tensors:
        kv = {
            f"model.layers.{layer}.self_attn.{part}_proj.output_scale": torch.tensor(0.25 + layer)
            for layer in range(2)
            for part in "kv"
        }
        return {**to_modelopt_fp8(tensors), **kv}

    modelopt = Path(shutil.copytree(folder, folder.parent / "modelopt"))
    edit_weights(modelopt, to_modelopt_fp8)
    edit_config(modelopt, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    edit_weights(folder, to_autofp8)
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    edit_config(folder, quantization_config=quantization)

    expected = load_model(str(modelopt), device="cpu", dtype="float32")
    assert_same(folder, expected.model)
    torch.testing.assert_close(logits(load_8_bit(folder)), logits(load_8_bit(modelopt)))
    num_layers = expected.model.config.num_hidden_layers
    scales = checkpoint_files.kv_scales(folder, num_layers)
    assert scales == ((0.25, 0.25), (1.25, 1.25), *[(1.0, 1.0)] * (num_layers - 2))

    edit_config(folder, quantization_config={**quantization, "weight_block_size": [128, 128]})
    assert "without its scales, model.layers.0.mlp.down_proj.weight_scale_inv" in refusal(folder)


def test_other_algorithms_of_modelopt_are_refused_by_name(folder: Path) -> None:
    file = folder / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    assert "NVIDIA ModelOpt quantised by 'W4A8_AWQ'" in refusal(folder)
    file.write_text("{")
    assert "hf_quant_config.json, which is damaged" in refusal(folder)
    edit_config(folder, quantization_config={"quant_method": "modelopt_fp4"})
    assert "NVIDIA ModelOpt quantised by 'None'" in refusal(folder)


def test_fbgemm_fp8_has_a_scale_for_each_row(folder: Path) -> None:
    expected = make_model("llama")
    scales = {}
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            if name.endswith("proj.weight"):
                scales[name] = weight.abs().amax(1, keepdim=True) / 448
                narrow = (weight / scales[name]).to(torch.float8_e4m3fn)
                weight.copy_(narrow.float() * scales[name])

    def to_fbgemm(tensors: Tensors) -> Tensors:
        narrow = {name: (tensors[name] / scales[name]).to(torch.float8_e4m3fn) for name in scales}
        return {**tensors, **narrow, **{f"{name}_scale": scales[name] for name in scales}}

    edit_weights(folder, to_fbgemm)
    edit_config(folder, quantization_config={"quant_method": "fbgemm_fp8"})
    assert_same(folder, expected)


def test_modelopt_that_left_the_weights_alone_is_read(folder: Path) -> None:
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    scales = {
        f"model.layers.{i}.self_attn.{kind}_proj.{kind}_scale": torch.tensor(0.5 + i)
        for i in range(3)
        for kind in "kv"
    }
    edit_weights(folder, lambda tensors: {**tensors, **scales})

    assert_same(folder, make_model("llama"))
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    assert loaded.kv_scales == ((0.5, 0.5), (1.5, 1.5), (2.5, 2.5))


@pytest.mark.parametrize("where", ["config", "text_config"])
def test_an_unknown_method_is_refused_before_weights_are_looked_at(
    folder: Path, where: str
) -> None:
    (folder / "model.safetensors").unlink()
    quantization = {"quantization_config": {"quant_method": "squeeze"}}
    edit_config(folder, **(quantization if where == "config" else {"text_config": quantization}))
    assert "quantised by 'squeeze' (quant_method in config.json)" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, "need the package .*pip install .*gptqmodel"),
        ({"quant_method": "awq", "bits": 3}, "need the package gptqmodel: pip install gptqmodel"),
        ({"load_in_8bit": True}, "pip install bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "pip install compressed-tensors"),
        ({"bits": 4}, "a quantization_config without quant_method"),
    ],
)
def test_what_needs_a_package_names_it(
    folder: Path, config: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    edit_config(folder, quantization_config=config)
    with pytest.raises(ModelError, match=expected):
        load_model(str(folder), device="cpu", dtype="float32")


def test_mlx_is_named(folder: Path) -> None:
    edit_config(folder, quantization={"group_size": 64, "bits": 4})
    assert "MLX quantised (4 bits)" in refusal(folder)
    edit_config(folder, quantization_config={"group_size": 64, "bits": 4})
    assert "MLX quantised (4 bits)" in refusal(folder)


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
@pytest.mark.parametrize(
    ("name", "shape", "hint"),
    [
        (f"{Q_PROJ}.bias", (64,), "may lack attention_bias"),
        (f"{Q_PROJ}.weight_scale", (64, 1), "scales of quantised weights"),
        ("model.layers.3.mlp.gate_proj.weight", (96, 64), ""),
        ("model.layers.0.self_attn.q_norm.weight", (16,), ""),
        ("score.weight", (2, 64), ""),
        ("model.layers.0.attn.bias", (64,), "may lack attention_bias"),
    ],
)
def test_tensors_without_a_place_are_refused_by_name(
    folder: Path, dtype: str, name: str, shape: tuple[int, ...], hint: str
) -> None:
    edit_weights(folder, lambda tensors: {**tensors, name: torch.ones(shape)})
    message = refusal(folder, dtype)
    assert f"1 tensor has no place in it, first {name}" in message
    assert hint in message


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_tensors_that_no_answer_depends_on_are_left_out(folder: Path, dtype: str) -> None:
    expected = load_model(str(folder), device="cpu", dtype=dtype).model
    edit_config(folder, num_nextn_predict_layers=1)
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.3.eh_proj.weight": torch.ones(64, 128),
        "mtp.layers.0.mlp.gate_proj.weight": torch.ones(96, 64),
        "model.mtp_layers.0.norm.weight": torch.ones(64),
        "model.vision_tower.patch.weight": torch.ones(4, 4),
        "multi_modal_projector.linear_1.weight": torch.ones(4, 4),
        "model.layers.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        "model.position_ids": torch.arange(8),
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5),
        "model.layers.0.self_attn.q_scale": torch.tensor(0.5),
        "model.layers.1.self_attn.qkv_proj.v_scale": torch.tensor(0.25),
    }
    edit_weights(folder, lambda tensors: {**tensors, **extras})
    loaded = load_model(str(folder), device="cpu", dtype=dtype)
    torch.testing.assert_close(logits(loaded.model), logits(expected))
    assert loaded.kv_scales is not None
    assert loaded.kv_scales[:2] == ((0.5, 1.0), (1.0, 0.25))


def test_tied_weights_that_are_stored_twice_and_differ_stay_two(tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)

    assert_same(tmp_path, model)
    made_by, cpu = checkpoint.read_architecture(tmp_path), torch.device("cpu")
    whole = checkpoint.load_folder(tmp_path, made_by, cpu, torch.float32, fp8=True)
    assert whole.lm_head.weight is not whole.model.embed_tokens.weight
    torch.testing.assert_close(logits(whole), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_a_tensor_of_another_shape_is_named_with_both(folder: Path, dtype: str) -> None:
    edit_config(folder, intermediate_size=80)
    message = refusal(folder, dtype)
    assert "tensors of other shapes: 9, first" in message
    assert "mlp.down_proj.weight: stored [64, 96], expected [64, 80]" in message


def test_experts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"

    def cut(tensors: Tensors) -> Tensors:
        return {**tensors, name: tensors[name][:16].contiguous()}

    edit_weights(tmp_path, cut)
    assert f"{name} is [16, 64], of other experts [32, 64]" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "a LoRA adapter of org/base, .*merge",
        ),
        (["params.json", "consolidated.safetensors"], "format of Mistral's or Meta's own code"),
        (
            ["config.json", "consolidated.safetensors"],
            "has consolidated.safetensors, in the format",
        ),
        (["config.json", "pytorch_model.bin"], "has pytorch_model.bin, .*save the model again"),
        (["config.json", "adapter_config.json"], "holds a LoRA adapter of org/base, .*take adap"),
        (["config.json", "model.gguf"], "has model.gguf: give that file"),
        (["model.gguf"], "holds model.gguf: give that file"),
    ],
)
def test_folders_of_other_formats_are_named(
    tmp_path: Path, files: list[str], expected: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    if "config.json" in files:
        make_config("llama").save_pretrained(tmp_path)
    if "adapter_config.json" in files:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ModelError, match=expected):
        load_model(str(tmp_path), device="cpu", dtype="float32")


def save_rounded(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save a model in `dtype`, and round its own weights alike."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))


def test_float16_with_the_fields_of_older_configs(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = make_model("llama", rope_parameters={**rope, "rope_theta": 5e5})
    save_rounded(model, torch.float16, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    older = {"rope_theta": 5e5, "rope_scaling": rope, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **older}))
    assert_same(tmp_path, model)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    model = make_model("qwen3")
    save_rounded(model, torch.bfloat16, tmp_path)
    assert_same(tmp_path, model)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_may_be_stored(stored: bool, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    if stored:
        head = model.lm_head.weight.detach().clone()
        edit_weights(tmp_path, lambda tensors: {**tensors, "lm_head.weight": head})
    assert_same(tmp_path, model)


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda ts: {name.removeprefix("model."): t for name, t in ts.items()})
    assert_same(tmp_path, model)


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    changes = {"model_type": "gpt2", "n_positions": 64, "n_head": 4, "n_embd": 64, "n_layer": 2}
    model = make_model("llama", tie_word_embeddings=True, **changes)
    model.save_pretrained(tmp_path)

    def to_2019(tensors: Tensors) -> Tensors:
        old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        mask = torch.ones(64, 64, dtype=torch.uint8).tril()[None, None]
        for layer in range(2):
            old[f"h.{layer}.attn.bias"] = mask.clone()
            old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return old

    edit_weights(tmp_path, to_2019)
    assert_same(tmp_path, model)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_experts_one_by_one_or_stacked(family: str, name: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert name in load_file(tmp_path / "model.safetensors")
    assert_same(tmp_path, model)
    if family == "qwen3_moe":
        edit_weights(tmp_path, lambda _: {n: t.clone() for n, t in model.state_dict().items()})
        assert_same(tmp_path, model)


def test_the_layer_of_deepseek_that_guesses_ahead_is_left_out(tmp_path: Path) -> None:
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path)

    def with_next(tensors: Tensors) -> Tensors:
        last = {
            name.replace("layers.2.", "layers.3."): tensor.clone()
            for name, tensor in tensors.items()
            if "layers.2." in name
        }
        head = {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}
        return {**tensors, **last, **head, "model.layers.3.shared_head.norm.weight": torch.ones(64)}

    edit_weights(tmp_path, with_next)
    edit_config(tmp_path, num_nextn_predict_layers=1)
    assert_same(tmp_path, model)
    edit_config(tmp_path, num_nextn_predict_layers=0)
    assert "18 tensors have no place in it, first model.layers.3." in refusal(tmp_path)


@pytest.mark.parametrize("part", ["lm_head.weight", "model.layers.2.mlp."])
def test_what_is_missing_is_named(folder: Path, part: str) -> None:
    edit_weights(folder, lambda ts: {n: t for n, t in ts.items() if not n.startswith(part)})
    for dtype in ("float32", "fp8"):
        assert f"missing keys, first {part}" in refusal(folder, dtype)


def test_mxfp4_of_gpt_oss_is_dequantised(tmp_path: Path) -> None:
    model = make_model("gpt_oss", intermediate_size=64)
    model.save_pretrained(tmp_path)
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values))
    packed: Tensors = {}
    for layer in range(3):
        experts = model.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            num_experts, inputs, outputs = weight.shape
            blocks = torch.randint(0, 256, (num_experts, outputs, inputs // 32, 16))
            scales = torch.randint(120, 125, (num_experts, outputs, inputs // 32))
            pairs = torch.stack((values[blocks & 15], values[blocks >> 4]), -1).flatten(-2)
            wide = pairs * (scales - 127.0).exp2()[..., None]
            weight.data.copy_(wide.flatten(-2).transpose(1, 2))
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            packed |= {f"{stem}_blocks": blocks.byte(), f"{stem}_scales": scales.byte()}

    def pack(tensors: Tensors) -> Tensors:
        wide = {stem.rpartition("_")[0] for stem in packed}
        return {**{n: t for n, t in tensors.items() if n not in wide}, **packed}

    edit_weights(tmp_path, pack)
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    assert_same(tmp_path, model)

    name = "model.layers.1.mlp.experts.down_proj_scales"
    edit_weights(tmp_path, lambda tensors: {**tensors, name: tensors[name][:, :-1].contiguous()})
    assert "down_proj_blocks is U8 [4, 64, 2, 16] and its scales U8 [4, 63, 2]" in refusal(tmp_path)

    edit_weights(tmp_path, lambda tensors: {**tensors, name: packed[name]})
    edit_weights(
        tmp_path,
        lambda tensors: {**tensors, Q_PROJ + ".weight": tensors[Q_PROJ + ".weight"].char()},
    )
    assert f"{Q_PROJ}.weight is stored as I8, which no MXFP4 checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "generation_config.json"),
        ("[]", "generation_config.json is not a JSON object"),
        ('{"eos_token_id": "</s>"}', "has eos_token_id '</s>'; expected a token id or a list"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_a_damaged_generation_config_does_not_lose_end_tokens_in_silence(
    text: str, expected: str, dtype: str, folder: Path
) -> None:
    (folder / "generation_config.json").write_text(text)
    assert expected in refusal(folder, dtype)
