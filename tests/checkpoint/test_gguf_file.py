"""GGUF files: equal to the model they were made of, or refused by the key that is not read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from tiny_models import make_model
from tiny_tokenizer import VOCAB_SIZE

from hotset.checkpoint.gguf_file import GgufFile
from hotset.errors import ModelError
from hotset.model.loader import load_model

TOKENS = torch.arange(3, 30).unsqueeze(0)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TIED = {"tie_word_embeddings": True}
ROUTED = {"norm_topk_prob": True}  # as llama.cpp takes for granted


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(TOKENS, use_cache=False).logits
    return out


def load(path: Path) -> Any:
    return load_model(str(path), device="cpu", dtype="float32").model


def refusal(model: Any, path: Path, **extra: Any) -> str:
    write_gguf(model, path, extra={key.replace("__", "."): value for key, value in extra.items()})
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "F32", {}),
        ("llama", "F32", {"model_type": "qwen2"}),
        ("llama", "F32", {"model_type": "phi3", "sliding_window": 12}),
        ("llama", "F16", {"tie_word_embeddings": True, "head_dim": 32}),
        ("qwen3", "F32", {"head_dim": 32}),  # not 128
        ("qwen3_moe", "F32", {"head_dim": 32, "moe_intermediate_size": 64, **ROUTED}),  # not 768
        ("gemma2", "F32", {"final_logit_softcapping": 20.0, **TIED}),  # no SDPA
        ("gemma2", "Q8_0", {"query_pre_attn_scalar": 32, "head_dim": 32, **TIED}),
        ("gemma3_text", "F32", {"layer_types": None, "num_hidden_layers": 7, **TIED}),
    ],
)
def test_a_file_is_the_model_it_was_made_of(
    family: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(family, vocab_size=VOCAB_SIZE, **changes)
    write_gguf(model, tmp_path / "model.gguf", kind=kind)

    loaded = load(tmp_path / "model.gguf")

    bound = {"F32": 1e-5, "F16": 2e-2, "Q8_0": 0.5}[kind]
    assert (logits(loaded) - logits(model)).abs().max() < bound
    for name in ("sliding_window", "layer_types", "rope_parameters", "query_pre_attn_scalar"):
        assert getattr(loaded.config, name, None) == getattr(model.config, name, None), name


@pytest.mark.parametrize(("family", "num_layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_27b_gemmas_scale_queries_by_their_width(
    family: str, num_layers: int, tmp_path: Path
) -> None:
    changes = {"num_hidden_layers": num_layers, "head_dim": 8, "layer_types": None, **TIED}
    model = make_model(family, vocab_size=VOCAB_SIZE, **changes)
    write_gguf(model, tmp_path / "model.gguf")
    config = GgufFile(tmp_path / "model.gguf").config()
    assert config.query_pre_attn_scalar == 64 // 4
    assert config.layer_types == model.config.layer_types


def test_the_frequencies_of_llama_3_1_are_a_tensor_of_the_file(tmp_path: Path) -> None:
    model = make_model("llama", vocab_size=VOCAB_SIZE, rope_parameters=LLAMA3)
    plain = 1 / LLAMA3["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert len(set(factors.round(3))) > 2
    write_gguf(model, tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})

    loaded = load(tmp_path / "model.gguf")

    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_positions_that_are_scaled_evenly(family: str, tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    rope = linear if family == "qwen3" else {"full_attention": linear, "sliding_attention": local}
    changes: dict[str, Any] = {} if family == "qwen3" else {"layer_types": None, **TIED}
    model = make_model(
        family, vocab_size=VOCAB_SIZE, num_hidden_layers=7, rope_parameters=rope, **changes
    )
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    write_gguf(model, tmp_path / "model.gguf", extra=keys)
    torch.testing.assert_close(logits(load(tmp_path / "model.gguf")), logits(model))


def test_what_is_not_read_is_refused_by_its_key(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    assert "rope.scaling.type is 'yarn'" in refusal(llama, path, **yarn)
    assert "llama.attention.scale is 0.5" in refusal(llama, path, attention__scale=0.5)
    assert "attention.value_length is 8" in refusal(llama, path, attention__value_length=8)
    assert "llama.expert_count is 8" in refusal(llama, path, expert_count=8)
    bias = {"blk.1.attn_q.bias": np.ones(64, np.float32)}
    assert "no place in the model, first blk.1.attn_q.bias" in refusal(llama, path, **bias)
    long = {"rope_factors_long.weight": np.ones(8, np.float32)}
    assert "first rope_factors_long.weight" in refusal(llama, path, **long)
    assert "one of the 3 files" in refusal(llama, path, split__count=3)
    assert "a GGUF of type 'adapter'" in refusal(llama, path, general__type="adapter")
    write_gguf(llama, path, extra={"expert_count": 0, "rope.scaling.type": "none"})
    torch.testing.assert_close(logits(load(path)), logits(llama))


@pytest.mark.parametrize("pattern", [6, [True] * 5 + [False, True], 4, [True, False] * 3 + [True]])
def test_which_layers_slide_may_be_said_and_has_to_fit(pattern: Any, tmp_path: Path) -> None:
    changes = {"layer_types": None, "num_hidden_layers": 7, **TIED}
    model = make_model("gemma3_text", vocab_size=VOCAB_SIZE, **changes)
    path = tmp_path / "model.gguf"
    write_gguf(model, path, extra={"attention.sliding_window_pattern": pattern})
    if pattern == 6 or (isinstance(pattern, list) and pattern[1]):
        assert GgufFile(path).config().layer_types == model.config.layer_types
    else:
        with pytest.raises(ModelError, match="sliding_window_pattern is"):
            GgufFile(path).config()


def test_gpt_oss_is_refused_for_its_experts(tmp_path: Path) -> None:
    model = make_model("gpt_oss", vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        for layer in model.model.layers:  # what the writer of the tests knows
            layer.mlp.experts.gate_up_proj_bias = None
            layer.mlp.experts.down_proj_bias = None
            layer.self_attn.sinks = None
    assert "no place in the model, first blk.0.ffn_" in refusal(model, tmp_path / "model.gguf")


def test_other_architectures_and_damage_are_one_line(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"llama", b"lamma"))
    with pytest.raises(ModelError, match="architecture 'lamma', of which transformers"):
        load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged, cut short"):
        load(path)
