"""Steps as compiled code for rows: what the model's own code computes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from paged import gather, paged_logits
from tiny_models import make_model
from tiny_tokenizer import VOCAB_SIZE

from hotset.engine.build import build_engine
from hotset.engine.run import run_to_end
from hotset.executor.probe import inspect_model
from hotset.executor.rows import lowering, program
from hotset.executor.rows.trace import NotTraceable, trace
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import SamplingParams

pytest.importorskip("llvmlite", reason="the extra `cpu` is not installed")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Q4_1", {}),
    "tied": ("llama", "Q4_0", {"tie_word_embeddings": True}),
    "biases": ("llama", "Q8_0", {"model_type": "qwen2"}),
    "merged in the file": ("llama", "Q8_0", {"model_type": "phi3", "sliding_window": 12}),
    "norms of queries and keys": ("qwen3", "Q4_1", {}),
    "soft caps": ("gemma2", "Q8_0", {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "windows": ("gemma3_text", "Q4_0", {"layer_types": None, "tie_word_embeddings": True}),
}


def narrow_model(path: Path, family: str, kind: str, changes: dict[str, Any]) -> Any:
    write_gguf(make_model(family, vocab_size=VOCAB_SIZE, **WIDE, **changes), path, kind=kind)
    return load_model(str(path), device="cpu", dtype="auto").model


@pytest.mark.parametrize("block_size", [4, 16])  # attention by PyTorch, and by code of its own
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_of_all_kinds_have_the_logits_of_the_model(
    name: str, block_size: int, tmp_path: Path
) -> None:
    model = narrow_model(tmp_path / "model.gguf", *FAMILIES[name])
    layout = inspect_model(model)
    expected = paged_logits(model, layout, gather(layout), block_size=block_size)

    found = paged_logits(model, layout, gather(layout), block_size=block_size, as_rows=True)

    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 24}])
def test_an_engine_has_the_same_tokens_with_and_without(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks beside decodes, and more requests than there are blocks for."""
    path = tmp_path / "model.gguf"
    narrow_model(path, *FAMILIES["llama"])
    prompts = [list(range(3, 3 + length)) for length in (5, 40, 17, 70)]
    answers = []
    used = []
    logits = program.RowProgram.logits
    monkeypatch.setattr(
        program.RowProgram, "logits", lambda *args: used.append(args) or logits(*args)
    )
    for eager in (True, False):
        loaded = load_model(str(path), device="cpu", dtype="auto")
        config = Options.of(hot_gib=120 / 2**20, eager=eager, max_model_len=128, **options)
        engine = build_engine(config, loaded)
        used.clear()
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        ids = [engine.add_request(prompt, params) for prompt in prompts]
        tokens: dict[str, list[int]] = {name: [] for name in ids}
        for output in run_to_end(engine):
            tokens[output.request_id] += output.token_ids
        answers.append(list(tokens.values()))
        assert bool(used) is not eager
        engine.close()
    assert answers[0] == answers[1]


def test_a_row_has_the_same_bits_whatever_shares_its_step(tmp_path: Path) -> None:
    model = narrow_model(tmp_path / "model.gguf", *FAMILIES["norms of queries and keys"])
    layout = inspect_model(model)
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(paged_logits(model, layout, gather(layout), block_size=16, as_rows=True))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_wrong_program_is_found_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = narrow_model(tmp_path / "model.gguf", *FAMILIES["llama"])
    monkeypatch.setitem(lowering.LOWERED, "silu", lowering.LOWERED["sigmoid"])
    layout = inspect_model(model)
    with pytest.raises(AssertionError), caplog.at_level(logging.WARNING):
        paged_logits(model, layout, gather(layout), as_rows=True)
    assert "compiled ones are wrong by" in caplog.text


def test_blocks_too_small_for_a_trial_leave_steps_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    narrow_model(path, *FAMILIES["llama"])
    prompt, params = list(range(3, 20)), SamplingParams(max_tokens=8, ignore_eos=True)
    answers = []
    for block_size in (2, 16):
        config = Options.of(hot_gib=120 / 2**20, max_model_len=64, block_size=block_size)
        engine = build_engine(config, load_model(str(path), device="cpu", dtype="auto"))
        assert (engine.executor.runner._program is None) == (block_size == 2)
        engine.add_request(prompt, params)
        answers.append([token for output in run_to_end(engine) for token in output.token_ids])
        engine.close()
    assert answers[0] == answers[1]


class Changed(torch.nn.Module):
    """A module whose output a function changes."""

    def __init__(self, inner: torch.nn.Module, function: Any) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.function(self.inner(x))
        return out


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x.cumsum(-1), "cumsum"),
        (lambda x: x.double().float(), "float64"),
        (lambda x: x * 2 if float(x[0, 0, 0]) > 0 else x, "_local_scalar_dense"),
        (lambda x: torch.add(x, x, alpha=2), "add with"),
        (lambda x: x.mean(1, keepdim=True), "mean over"),
    ],
)
def test_what_has_no_code_is_refused_by_name(function: Any, what: str, tmp_path: Path) -> None:
    model = narrow_model(tmp_path / "model.gguf", *FAMILIES["llama"])
    inspect_model(model)
    layer = model.model.layers[1]
    layer.mlp = Changed(layer.mlp, function)

    with pytest.raises(NotTraceable, match=what):
        trace(model)

    assert "forward" not in vars(model.lm_head)  # as it was
