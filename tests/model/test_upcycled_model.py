"""Upcycling: a dense model's folder becomes one of a Mixture of Experts that answers alike."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model
from tiny_tokenizer import VOCAB_SIZE, make_tokenizer

from hotset.errors import ModelError
from hotset.experts.weights import experts_layers
from hotset.model import default_model, upcycled_model
from hotset.model.loader import load_model
from hotset.model.upcycled_model import upcycle

TOKENS = torch.tensor([[5, 9, 13, 200, 7, 31]])


def dense_folder(path: Path, **changes: object) -> Path:
    model = make_model("llama", vocab_size=VOCAB_SIZE, **changes)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def logits(folder: Path) -> torch.Tensor:
    model = load_model(str(folder), device="cpu", dtype="float32").model
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("is_tied", [False, True])
def test_without_noise_the_logits_are_those_of_the_dense_model(
    is_tied: bool, tmp_path: Path
) -> None:
    dense = dense_folder(tmp_path / "dense", tie_word_embeddings=is_tied, rope_theta=5000.0)
    upcycle(dense, tmp_path / "made", num_experts=4, top_k=2, noise=0.0)
    loaded = load_model(str(tmp_path / "made"), device="cpu", dtype="float32")
    layers = experts_layers(loaded.model)
    assert type(loaded.model).__name__ == "MixtralForCausalLM"
    assert [layer.num_experts for layer in layers] == [4, 4, 4]
    torch.testing.assert_close(logits(tmp_path / "made"), logits(dense), atol=1e-4, rtol=1e-4)
    ids = loaded.require_tokenizer().apply_chat_template([{"role": "user", "content": "x"}])
    assert ids  # the chat template came along


def test_noise_makes_experts_that_differ_a_little_by_the_seed(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense")
    made: list[dict[str, torch.Tensor]] = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        upcycle(dense, folder, num_experts=3, top_k=2, noise=0.05, seed=seed)
        made.append(load_file(folder / "model.safetensors"))
    first, again, other = made
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    source = load_file(dense / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert not torch.equal(first[name.format(0)], first[name.format(1)])
    assert not torch.equal(first[name.format(0)], other[name.format(0)])
    added = (first[name.format(2)] - source).std() / source.std()
    assert added.item() == pytest.approx(0.05, rel=0.05)
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert not torch.equal(first[router], other[router])
    assert not torch.equal(logits(tmp_path / "0"), logits(dense))


def test_it_is_kept_beside_the_default_model_and_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_folder(tmp_path / "dense")
    monkeypatch.setattr(
        default_model.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name)
    )
    monkeypatch.setattr(default_model, "ensure", lambda: dense)
    loaded = load_model(upcycled_model.NAME, device="cpu", dtype="float32")
    kept = upcycled_model.folder()
    assert kept.parent == default_model.folder().parent
    assert loaded.name == upcycled_model.NAME
    assert experts_layers(loaded.model)[0].num_experts == upcycled_model.NUM_EXPERTS
    made_at = (kept / "model.safetensors").stat().st_mtime_ns
    assert upcycled_model.ensure() == kept
    assert (kept / "model.safetensors").stat().st_mtime_ns == made_at
    (kept / "config.json").write_text("{}")
    assert json.loads((upcycled_model.ensure() / "config.json").read_text())["num_local_experts"]


def test_what_is_not_a_llama_model_without_biases_is_refused(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            upcycle(folder, tmp_path / "made", num_experts=2, top_k=1, noise=0.0)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "made").exists()

    refused(tmp_path, "no config.json that can be read")
    make_model("qwen3").save_pretrained(tmp_path / "qwen3")
    refused(tmp_path / "qwen3", "holds a 'qwen3' model; expected a 'llama' model")
    refused(dense_folder(tmp_path / "biased", mlp_bias=True), "has biases")
