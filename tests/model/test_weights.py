"""Weights go from files to their place: the same model, and no more memory than it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_config, make_model
from transformers.core_model_loading import WeightRenaming

from hotset.checkpoint.files import read_config
from hotset.checkpoint.tensors import CheckpointTensors
from hotset.errors import ModelError
from hotset.linear.merged import MergedLinear
from hotset.model import checkpoint, weights
from hotset.model.architecture import Architecture
from hotset.model.loader import load_model

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 30).unsqueeze(0)


def in_place(folder: Path, dtype: torch.dtype = torch.float32, *, fp8: bool = False) -> Any:
    made_by = checkpoint.read_architecture(folder)
    tensors = CheckpointTensors(folder, made_by.fields)
    model = weights.load_in_place(made_by, tensors, CPU, dtype, fp8=fp8)
    return None if model is None else model.eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(TOKENS, use_cache=False).logits
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_the_model_is_the_one_that_was_saved(
    family: str, tied: bool, shards: bool, tmp_path: Path
) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="100KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards

    loaded = in_place(tmp_path)

    torch.testing.assert_close(logits(loaded), logits(model))
    assert sum(isinstance(module, MergedLinear) for module in loaded.modules()) == 3 * 5
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_biases_and_the_generation_config_arrive_too(tmp_path: Path) -> None:
    model = make_model("llama", attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))

    loaded = in_place(tmp_path)

    torch.testing.assert_close(logits(loaded), logits(model))
    assert loaded.generation_config.eos_token_id == [7, 9]


def test_biases_of_merged_8_bit_layers_arrive(tmp_path: Path) -> None:
    model = make_model("llama", model_type="qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)

    loaded = in_place(tmp_path, fp8=True)

    attention, expected = loaded.model.layers[1].self_attn, model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(attention, name)
        assert torch.equal(layer.whole.bias[layer.columns], getattr(expected, name).bias)
    exact = logits(model)
    assert (logits(loaded) - exact).norm() < 0.15 * exact.norm()  # of rounding


def test_what_is_left_over_is_known_by_the_name_that_transformers_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"model.eyes.patch.weight": torch.ones(4, 4)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensor has no place in it, first model\.eyes"):
        in_place(tmp_path)

    renaming = WeightRenaming(r"model\.eyes", "model.vision_tower")
    monkeypatch.setattr(weights, "get_model_conversion_mapping", lambda model: [renaming])
    assert in_place(tmp_path) is not None


def test_a_checkpoint_in_another_dtype_is_converted(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    loaded = in_place(tmp_path, torch.float16)
    expected = load_model(str(tmp_path), device="cpu", dtype="float16").model
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    assert torch.equal(loaded.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def test_what_no_checkpoint_holds_is_computed_as_precisely_as_by_transformers(
    tmp_path: Path,
) -> None:
    # Its sines are made in the default dtype, which is that of the weights while it is made.
    config = transformers.CodeGenConfig(
        vocab_size=128, n_positions=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=8
    )
    transformers.CodeGenForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    fields = read_config(tmp_path)
    tensors = CheckpointTensors(tmp_path, fields)
    expected = transformers.CodeGenForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)

    made_by = Architecture(config, fields, transformers.CodeGenForCausalLM, is_inspected=True)
    model = weights.load_in_place(made_by, tensors, CPU, torch.bfloat16, fp8=False)

    assert model is not None
    buffers, of_transformers = dict(model.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == of_transformers.keys()
    assert any(name.endswith("embed_positions") for name in buffers)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, of_transformers[name], rtol=0, atol=0)
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_is_stored_in_another_form_is_left_to_transformers(
    family: str, tmp_path: Path
) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert in_place(tmp_path) is None
    made_by = checkpoint.read_architecture(tmp_path)
    loaded = checkpoint.load_folder(tmp_path, made_by, CPU, torch.float32, fp8=True)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_missing_tensor_or_another_shape_is_refused_as_ever(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
    assert in_place(tmp_path) is None
    with pytest.raises(ModelError, match=r"1 missing keys, first .*k_proj"):
        load_model(str(tmp_path), device="cpu", dtype="fp8")

    save_file({**tensors, name: tensors[name][:16]}, tmp_path / "model.safetensors")
    assert in_place(tmp_path) is None
    with pytest.raises(ModelError):
        load_model(str(tmp_path), device="cpu", dtype="fp8")


def test_damage_is_one_line(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot load the weights") as caught:
        load_model(str(tmp_path), device="cpu", dtype="fp8")
    assert "\n" not in str(caught.value)


# In a process of its own, where no freed memory of other tests is taken again.
MEASURE = """
import json, os, sys, threading
from pathlib import Path
import torch
from hotset.model import weights
from hotset.model.checkpoint import read_architecture
from hotset.checkpoint.tensors import CheckpointTensors
from hotset.model.loader import load_model

folder, ended = Path(sys.argv[1]), threading.Event()

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def measure(load):
    start, peak, ended = anonymous_bytes(), [0], threading.Event()
    def watch():
        while not ended.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes() - start)
    thread = threading.Thread(target=watch)
    thread.start()
    model = load()
    ended.set()
    thread.join()
    return peak[0], sum(p.nbytes for p in model.parameters())

def in_place(fp8):
    made_by = read_architecture(folder)
    tensors = CheckpointTensors(folder, made_by.fields)
    device, dtype = torch.device("cpu"), torch.bfloat16
    return weights.load_in_place(made_by, tensors, device, dtype, fp8=fp8)

loads = {
    "pages": lambda: load_model(str(folder), device="cpu", dtype="bfloat16").model,
    "in place": lambda: in_place(False),
    "8 bits": lambda: in_place(True),
}
torch.set_num_threads(1)
for how in sys.argv[2:]:  # each in a process of its own, with what this one has imported
    if (child := os.fork()) == 0:
        print(json.dumps(measure(loads[how])), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, how
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_weights_are_never_in_memory_twice(tmp_path: Path) -> None:
    config = make_config(
        "llama",
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="64MB")
    whole_bytes = sum(p.nbytes for p in model.parameters())
    assert whole_bytes > 150e6
    del model

    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "in place", "8 bits", "pages"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MALLOC_MMAP_THRESHOLD_": "100000",  # what is freed goes back at once
        },
        capture_output=True,
        text=True,
        check=True,
    )
    in_place, in_8_bits, in_pages = map(json.loads, run.stdout.splitlines())
    small = 25e6  # what a few threads hold, and Python's own
    peak_bytes, num_bytes = in_place
    assert num_bytes == whole_bytes
    assert whole_bytes - small < peak_bytes < whole_bytes + small
    peak_bytes, num_bytes = in_8_bits
    assert num_bytes < 0.55 * whole_bytes
    assert num_bytes - small < peak_bytes < num_bytes + 2 * small  # and float32 of pieces
    peak_bytes, num_bytes = in_pages  # the CPU computes on the pages of the file
    assert num_bytes == whole_bytes
    assert peak_bytes < small
