"""GGUF files on a CPU: matrices stay as they are, and the logits are those of the widened model."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import write_gguf
from tiny_models import make_model
from tiny_tokenizer import VOCAB_SIZE
from torch import nn

from hotset.checkpoint.gguf_file import GgufFile
from hotset.errors import ModelError
from hotset.executor.probe import weights_bytes
from hotset.layout import Layout
from hotset.linear import native, tile_product
from hotset.linear.merged import MergedLinear
from hotset.linear.narrow import NarrowEmbedding, NarrowLinear, narrow_tiles
from hotset.model import loader
from hotset.model.checkpoint import load_gguf
from hotset.model.loader import load_model
from hotset.parallel import group

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 30).unsqueeze(0)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}

needs_products = pytest.mark.skipif(
    importlib.util.find_spec("llvmlite") is None, reason="the extra `cpu` is not installed"
)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(TOKENS, use_cache=False).logits
    return out


def write(path: Path, family: str, kind: str, **changes: Any) -> Path:
    model = make_model(family, vocab_size=VOCAB_SIZE, **WIDE, **changes)
    write_gguf(model, path, kind=kind)
    return path


def matrix(model: nn.Module, path: str) -> torch.Tensor:
    layer = model.get_submodule(path)
    if isinstance(layer, MergedLinear):
        return layer.whole.weight[layer.columns]
    weight: torch.Tensor = layer.weight
    return weight


@needs_products
@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "Q4_1", {}),  # rows of queries and keys are reordered
        ("llama", "Q4_0", {"tie_word_embeddings": True}),
        ("llama", "Q8_0", {"model_type": "qwen2"}),  # biases
        ("llama", "Q8_0", {"model_type": "phi3", "sliding_window": 12}),  # merged in the file
        ("qwen3", "Q4_1", {}),
        ("gemma2", "Q8_0", {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
        ("gemma3_text", "Q4_0", {"layer_types": None, "tie_word_embeddings": True}),
    ],
)
def test_a_narrow_model_is_the_widened_one(
    family: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", family, kind, **changes)
    wide, *_ = load_gguf(path, CPU, torch.float32)

    loaded = load_model(str(path), device="cpu", dtype="auto")

    narrow = loaded.model
    paths = [name for name, layer in wide.named_modules() if type(layer) is nn.Linear]
    kept = {name for name, layer in narrow.named_modules() if isinstance(layer, NarrowLinear)}
    assert len(paths) > 7 and not any(type(m) is nn.Linear for m in narrow.modules())
    for name in paths:
        assert name in kept or f"{name}.whole" in kept or "proj" in name, name
        assert torch.equal(matrix(narrow, name), wide.get_submodule(name).weight), name
    torch.testing.assert_close(logits(narrow), logits(wide), rtol=1e-4, atol=1e-4)
    assert any(f"{kind} kept as in the file" in note for note in loaded.notes)


@needs_products
def test_a_tied_table_is_held_once_and_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q4_1", tie_word_embeddings=True)
    model = load_model(str(path), device="cpu", dtype="auto").model
    assert isinstance(model.model.embed_tokens, NarrowEmbedding)
    assert model.lm_head.tiles is model.model.embed_tokens.tiles
    stored = {t.name: t.n_bytes for t in GgufFile(path).tensors if t.tensor_type.name == "Q4_1"}
    assert sum(tiles.num_bytes for tiles in narrow_tiles(model)) == sum(stored.values())
    vectors = sum(p.nbytes for p in model.parameters())
    assert weights_bytes(model) == sum(stored.values()) + vectors


@needs_products
def test_other_types_are_widened_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q5_1")
    loaded = load_model(str(path), device="cpu", dtype="auto")
    assert not narrow_tiles(loaded.model)
    assert any("widened" in note and "Q5_1" in note for note in loaded.notes)


def test_what_cannot_stay_narrow_is_widened_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q4_1")
    monkeypatch.setattr(native, "can_compile", lambda: False)
    loaded = load_model(str(path), device="cpu", dtype="auto")
    assert any("widened as they are read: the package llvmlite" in n for n in loaded.notes)
    monkeypatch.setattr(native, "can_compile", lambda: True)
    monkeypatch.setattr(tile_product, "check", lambda form: "products are wrong by 1")
    loaded = load_model(str(path), device="cpu", dtype="auto")
    assert any("Q4_1 are not right (products are wrong by 1)" in n for n in loaded.notes)
    assert not narrow_tiles(loaded.model)
    experts = write(tmp_path / "experts.gguf", "qwen3_moe", "Q4_1", norm_topk_prob=True)
    loaded = load_model(str(experts), device="cpu", dtype="auto")
    assert any("it has experts" in note for note in loaded.notes)


@pytest.mark.parametrize("where", ["a GPU", "two ranks"])
def test_a_gpu_and_several_ranks_refuse_to_widen_unless_they_are_told_to(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q4_1")
    first = next(t for t in GgufFile(path).tensors if t.tensor_type.name == "Q4_1")
    if where == "two ranks":
        monkeypatch.setattr(group, "_current", group.Group(1, Layout(2), CPU, is_alone=True))
        why = "each of several ranks has a part of every matrix"
    else:
        monkeypatch.setattr(loader, "resolve_device", lambda name: torch.device("cuda"))
        why = "no kernel of a GPU multiplies them in float32"
    with pytest.raises(ModelError) as refused:
        load_model(str(path), device="auto", dtype="float32")
    named = f"weights, such as {first.name} with {first.n_bytes:,} bytes in the file, cannot stay"
    assert named in str(refused.value) and "\n" not in str(refused.value)
    assert f"{why}; give allow_widening to widen all 0.00 GB" in str(refused.value)

    monkeypatch.setattr(loader, "resolve_device", lambda name: CPU)  # where a GPU would have them
    _, _, _, note = load_gguf(path, CPU, torch.float32, why_wide=why)
    assert note is not None and note.startswith("weights: Q4_1 (0.00 GiB) in the file, widened")
    assert note.endswith(why)
    if where == "two ranks":
        loaded = load_model(str(path), device="cpu", dtype="auto", allow_widening=True)
        assert note in loaded.notes


def test_a_file_without_narrow_weights_is_read_anywhere_without_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", "F16")
    for why, allowed in (("a GPU", False), (None, True)):
        *_, note = load_gguf(path, CPU, torch.float32, why_wide=why, allow_widening=allowed)
        assert note is None


def test_weights_that_are_rounded_otherwise_are_not_refused_but_said(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", "Q4_1")
    loaded = load_model(str(path), device="cpu", dtype="fp8")
    assert any("widened as they are read: they are rounded to fp8" in n for n in loaded.notes)


@needs_products
@pytest.mark.parametrize("what", ["missing", "shape"])
def test_a_damaged_file_is_refused_by_the_tensor(what: str, tmp_path: Path) -> None:
    path, broken = write(tmp_path / "model.gguf", "llama", "Q4_1"), tmp_path / "broken.gguf"
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(broken, "llama")
    for field in list(reader.fields.values())[3:]:
        if field.name == "general.architecture":
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name == "blk.1.ffn_up.weight":
            if what == "missing":
                continue
            data = data[:-32]
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ModelError) as caught:
        load_model(str(broken), device="cpu", dtype="auto")

    assert "does not fit its config" in str(caught.value) and "up" in str(caught.value)
