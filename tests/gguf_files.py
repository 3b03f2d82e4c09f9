"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_tokenizer import VOCAB_SIZE, make_backend, make_tokenizer

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "gpt_oss": "gpt-oss"}
KINDS = {kind.name: kind for kind in gguf.GGMLQuantizationType}


def write_gguf(
    model: Any, path: Path, *, kind: str = "F32", extra: dict[str, Any] | None = None
) -> None:
    """Write a model and the tiny tokenizer.

    Args:
        model: of transformers, with `VOCAB_SIZE` tokens.
        path: of the new file.
        kind: of matrices, as GGML calls it; vectors are float32.
        extra: keys of the architecture to add, to change, or to leave out (None); arrays are
            tensors to add.
    """
    config = model.config
    assert config.vocab_size == VOCAB_SIZE
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    extra = dict(extra or {})
    tensors = {name: extra.pop(name) for name in list(extra) if hasattr(extra[name], "dtype")}
    for key, value in {**_metadata(config), **extra}.items():
        name = key if "." in key and key.split(".")[0] in ("general", "split") else ""
        _add(writer, name or f"{architecture}.{key}", value)
    _add_tokenizer(writer)
    for name, tensor in {**_tensors(model, architecture), **tensors}.items():
        if tensor.ndim < 2:
            writer.add_tensor(name, tensor.astype(np.float32))
            continue
        data = gguf.quants.quantize(tensor.astype(np.float32), KINDS[kind])
        writer.add_tensor(name, data, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head_dim = config.head_dim
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    if getattr(config, "sliding_window", None):
        fields["attention.sliding_window"] = config.sliding_window
    if getattr(config, "attn_logit_softcapping", None):
        fields["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        fields["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        fields["expert_count"] = getattr(config, "num_experts", None) or config.num_local_experts
        fields["expert_used_count"] = config.num_experts_per_tok
    if getattr(config, "moe_intermediate_size", None):
        fields["expert_feed_forward_length"] = config.moe_intermediate_size
    return fields


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"<unused{i}>" for i in range(len(tokens), VOCAB_SIZE)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    merges = json.loads(make_backend().to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        values = tensor.float().numpy()
        if suffix in ("gate_up_proj", "down_proj"):  # of all experts
            layer = int(name.split(".")[2])
            if suffix == "down_proj":
                found[f"blk.{layer}.ffn_down_exps.weight"] = values
            else:
                half = values.shape[1] // 2
                found[f"blk.{layer}.ffn_gate_exps.weight"] = values[:, :half]
                found[f"blk.{layer}.ffn_up_exps.weight"] = values[:, half:]
            continue
        if architecture in ("gemma2", "gemma3") and "norm" in stem:
            values = values + 1
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            is_query = stem.endswith("q_proj")
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            rows = values.shape[0] // heads // 2
            values = values.reshape(heads, 2, rows, *values.shape[1:])
            values = values.swapaxes(1, 2).reshape(tensor.shape)
        gguf_name = names.get_name(stem)
        assert gguf_name is not None, name
        found[f"{gguf_name}.{suffix}"] = values
    return found
