"""A Mixture of Experts small enough for a laptop: the default model, upcycled.

Every MLP of the dense model becomes eight experts, copies of it that differ by seeded noise, with a
seeded router that picks two for each token. With their weights summing to 1, two copies of an MLP
answer as the MLP does, so the model still speaks, a little worse. It was *not* trained as a Mixture
of Experts: its experts know nothing of their own. Its sizes, its routing by real hidden states and
the bytes that must be moved are like a real one's, which is what it is for.

Source: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
ICLR 2023, section 3; without its further training.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig

from hotset.checkpoint import kept_folder
from hotset.checkpoint.files import WEIGHTS
from hotset.errors import ModelError
from hotset.foreign_text import parse_json
from hotset.model import default_model

NAME = "smollm2-135m-upcycled"
NUM_EXPERTS = 8
TOP_K = 2
NOISE = 0.006  # of the deviation of each matrix; with 0.01, questions are answered in French
_SEED = 0
_ROUTER_STD = 0.2

# Of an MLP's matrices, in a Mixtral checkpoint.
_MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_KEPT_FILES = ("generation_config.json", "tokenizer*", "chat_template.jinja", "*.model")


def folder() -> Path:
    """Where it is kept: beside the default model."""
    return default_model.folder().parent / NAME


def ensure() -> Path:
    """Return its folder, made first from the default model where there is none that verifies.

    Raises:
        ModelError: the default model cannot be had, or this one not be kept.
    """
    target = folder()

    def make(scratch: Path) -> Path:
        dense = default_model.ensure()
        print(
            f"hotset: upcycling {default_model.NAME} into {NUM_EXPERTS} experts a layer once "
            f"(about 30 s and 1.4 GB), to be kept in {target}",
            file=sys.stderr,
        )
        upcycle(dense, scratch / "model", num_experts=NUM_EXPERTS, top_k=TOP_K, noise=NOISE)
        return scratch / "model"

    return kept_folder.ensure(target, make, "the upcycled model")


def upcycle(
    dense: Path, made: Path, *, num_experts: int, top_k: int, noise: float, seed: int = _SEED
) -> None:
    """Write the Llama model of the folder `dense` to the new folder `made` as a Mixtral model.

    Args:
        dense: with `config.json` and one file of weights.
        made: is created; weights are stored in the dtype that they have.
        num_experts: copies of each MLP.
        top_k: experts of a token.
        noise: standard deviation of the noise added to each matrix of a copy, as a share of the
            matrix's own; with 0 the logits equal the dense model's.
        seed: of noise and routers.

    Raises:
        ModelError: `dense` is not such a model, or has biases, which Mixtral models have not.
    """
    config = _config(dense, num_experts, top_k)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    with safe_open(dense / WEIGHTS, "pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            before, _, matrix = name.partition(".mlp.")
            if not matrix:
                weights[name] = tensor
                continue
            which = _MATRICES[matrix.removesuffix(".weight")]
            for expert in range(num_experts):
                place = f"{before}.block_sparse_moe.experts.{expert}.{which}.weight"
                weights[place] = _copy(tensor, noise, generator)
    hidden_size, dtype = config.hidden_size, tensor.dtype
    for layer in range(config.num_hidden_layers):
        router = torch.randn(num_experts, hidden_size, generator=generator) * _ROUTER_STD
        weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.to(dtype)
    made.mkdir()
    save_file(weights, made / WEIGHTS, metadata={"format": "pt"})
    config.dtype = dtype
    config.save_pretrained(made)
    for pattern in _KEPT_FILES:
        for file in dense.glob(pattern):
            shutil.copy(file, made)


def _copy(matrix: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    if noise == 0:
        return matrix.clone()
    added = torch.randn(matrix.shape, generator=generator) * (noise * matrix.float().std())
    return (matrix.float() + added).to(matrix.dtype)


def _config(dense: Path, num_experts: int, top_k: int) -> Any:
    """The config of the Mixtral model: attention, norms and embeddings are as in Llama models."""
    try:
        fields = parse_json((dense / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{dense} has no config.json that can be read: {error}") from error
    if fields.get("model_type") != "llama" or not (dense / WEIGHTS).is_file():
        raise ModelError(
            f"{dense} holds a {fields.get('model_type')!r} model; expected a 'llama' model with "
            f"its weights in {WEIGHTS}"
        )
    old = LlamaConfig(**fields)
    if old.attention_bias or old.mlp_bias:
        raise ModelError(f"{dense} has biases, which a Mixtral model has no place for")
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
        *("initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return MixtralConfig(
        **{name: getattr(old, name) for name in same},
        sliding_window=None,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        architectures=["MixtralForCausalLM"],
    )
