"""GGUF files as a GPU has them, in few bits; without one, the CPU widens them in each product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run
from test_narrow_gguf import CPU, TOKENS, logits, write
from torch import nn

from hotset.checkpoint.gguf_blocks import FORMS, weight_format
from hotset.checkpoint.gguf_file import GgufFile, read_once
from hotset.engine.load import load_engine
from hotset.errors import ModelError
from hotset.linear.merged import MergedLinear
from hotset.linear.quant_linear import QuantEmbedding, QuantLinear, check
from hotset.model import gpu_gguf
from hotset.model.architecture import find_architecture
from hotset.model.checkpoint import load_gguf
from hotset.model.loader import load_model
from hotset.model.narrow_linears import narrow_bytes
from hotset.options import Options


def load(path: Path, *, allow_widening: bool = False) -> Any:
    with read_once():
        header = GgufFile(path)
        config = header.config()
        architecture = find_architecture(config, str(path), config.to_dict())
        return gpu_gguf.load_narrow(
            header, architecture, CPU, torch.float32, allow_widening=allow_widening
        ).eval()


def matrix(model: nn.Module, path: str) -> torch.Tensor:
    layer = model.get_submodule(path)
    weight: torch.Tensor = (
        layer.whole.weight[layer.columns] if isinstance(layer, MergedLinear) else layer.weight
    )
    return weight


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "Q4_1", {}),  # rows of queries and keys are reordered
        ("llama", "Q4_0", {"tie_word_embeddings": True}),
        ("llama", "Q8_0", {"model_type": "qwen2"}),  # biases
        ("llama", "Q8_0", {"model_type": "phi3", "sliding_window": 12}),  # merged in the file
        ("qwen3", "Q4_1", {}),
    ],
)
def test_a_model_in_few_bits_is_the_widened_one(
    family: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", family, kind, **changes)
    wide, *_ = load_gguf(path, CPU, torch.float32)
    narrow = load(path)
    paths = [name for name, layer in wide.named_modules() if type(layer) is nn.Linear]
    assert len(paths) > 7 and not any(type(m) is nn.Linear for m in narrow.modules())
    for name in (*paths, "model.embed_tokens"):
        assert torch.equal(matrix(narrow, name), wide.get_submodule(name).weight), name
    torch.testing.assert_close(logits(narrow), logits(wide), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_gpu_answers_as_the_widened_model(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", kind, tie_word_embeddings=True)
    loaded = load_model(str(path), device="cuda", dtype="auto")
    assert narrow_bytes(loaded.model) > 0 and loaded.model.dtype == torch.bfloat16
    assert any(f"{kind} kept as in the file" in note for note in loaded.notes)
    wide = load_gguf(path, CPU, torch.float32)[0].cuda()
    tokens = TOKENS.cuda()
    with torch.inference_mode():
        got = loaded.model(tokens, use_cache=False).logits.float()
        expected = wide(tokens, use_cache=False).logits
    assert (got - expected).norm() < 5e-2 * expected.norm()
    options = Options.of(model=str(path), device="cuda", hot_gib=0.05, max_model_len=128)
    answers = []
    for eager in (False, True):
        engine, _ = load_engine(options.but(eager=eager))
        answers.append(run(engine, [list(range(3, 3 + n)) for n in (5, 40)]))
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", FORMS)
def test_products_of_each_type_pass_their_trial(kind: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert check(weight_format(kind), dtype, torch.device("cuda")) is None


def test_bytes_are_those_of_the_file_and_a_tied_table_is_held_once(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q4_0", tie_word_embeddings=True)
    model = load(path)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert isinstance(model.lm_head, QuantLinear)
    assert model.lm_head.payload is model.model.embed_tokens.payload
    stored = [t for t in GgufFile(path).tensors if t.tensor_type.name == "Q4_0"]
    payloads = {p for name, p in model.named_parameters() if name.endswith("payload")}
    padding = 2 * 128 * len(stored)  # planes begin where a processor reads at once
    total = sum(tensor.n_bytes for tensor in stored)
    assert total <= sum(p.nbytes for p in payloads) == narrow_bytes(model) <= total + padding


def test_types_that_no_kernel_reads_are_refused_unless_they_may_be_widened(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q5_1")
    with pytest.raises(ModelError, match=r"such as .* bytes in the file, cannot stay"):
        load(path)
    wide, *_ = load_gguf(path, CPU, torch.float32)
    torch.testing.assert_close(
        logits(load(path, allow_widening=True)), logits(wide), rtol=1e-4, atol=1e-4
    )


def test_a_scaled_embedding_is_widened_where_that_is_allowed(tmp_path: Path) -> None:
    changes = {"layer_types": None, "tie_word_embeddings": True}
    path = write(tmp_path / "model.gguf", "gemma3_text", "Q4_0", **changes)
    with pytest.raises(ModelError, match=r"such as token_embd\.weight"):
        load(path)
    wide, *_ = load_gguf(path, CPU, torch.float32)
    narrow = load(path, allow_widening=True)
    assert any(isinstance(module, QuantLinear) for module in narrow.modules())
    torch.testing.assert_close(logits(narrow), logits(wide), rtol=1e-4, atol=1e-4)


def test_a_file_that_lacks_a_matrix_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q4_0")
    left = [t for t in GgufFile(path).tensors if t.name != "blk.1.ffn_down.weight"]
    monkeypatch.setattr(GgufFile, "tensors", property(lambda self: left))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\..* is missing"):
        load(path)
