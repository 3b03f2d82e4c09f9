"""Sparse attention as a GPU runs it, launched and recorded, over fakes of FlashInfer and graphs."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_flashinfer import FakeRecorder
from fake_sparse import CpuSparse
from paged import gather, paged_logits
from tiny_models import SPARSE_FAMILIES, make_model
from torch._dynamo.testing import CompileCounter
from transformers.modeling_layers import GradientCheckpointingLayer

from hotset.attention import choice
from hotset.attention.batch import SequenceSpan
from hotset.attention.flashinfer import kernels, sparse
from hotset.attention.flashinfer.kernels import (
    LatentKernelNeed,
    SelectionKernelNeed,
    start_kernels,
    why_unsupported,
)
from hotset.attention.flashinfer.latent_rows import make_rows
from hotset.attention.hook import register
from hotset.attention.sparse.indexer import Index, bind_guesses
from hotset.attention.sparse.select import score_keys
from hotset.cost.attention import Indexer
from hotset.executor import graphs as graphs_module
from hotset.executor.probe import inspect_model
from hotset.memory.arena import DeviceArena, row_steps

# Experts on a CPU ask the host which tokens they have, which no tape replays.
DENSE = {"mlp_layer_types": ["dense"] * 3}


def backend_of(layout: Any, most_rows: int = 256) -> Callable[[DeviceArena], CpuSparse]:
    return lambda arena: CpuSparse(arena, layout.layers, max_context=59, most_rows=most_rows)


@pytest.mark.parametrize(
    ("family", "recorded"),
    [*((family, False) for family in SPARSE_FAMILIES), ("glm_moe_dsa", True), ("hy_v4", True)],
)
def test_a_model_computes_what_it_does_over_gathered_rows(
    family: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "GraphRecorder", FakeRecorder)
    model = make_model(family, **DENSE)
    layout = inspect_model(model)
    expected = paged_logits(model, layout, gather(layout))

    got = paged_logits(model, layout, backend_of(layout), recorded=recorded, compiles=False)

    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_steps_in_pieces_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("glm_moe_dsa", **DENSE)
    layout = inspect_model(model)
    expected = paged_logits(model, layout, backend_of(layout))
    monkeypatch.setattr(sparse, "SCORES_BYTES", 4 * 60 * 7)  # scores of 7 tokens

    got = paged_logits(model, layout, backend_of(layout, most_rows=5))

    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scored_at_once", [1, 5, 1000])
def test_each_token_lists_the_rows_of_what_it_selects_once_and_none_beyond_its_length(
    scored_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts end around K and around blocks, of decodes and of prompts that grow past K."""
    monkeypatch.setattr(sparse, "SCORES_BYTES", 4 * 60 * scored_at_once)
    layout = inspect_model(make_model("glm_moe_dsa", **DENSE))
    arena = DeviceArena(
        layout.cache_specs,
        num_blocks=61,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
        index_dims=layout.index_dims,
    )
    backend = CpuSparse(arena, layout.layers, max_context=60)
    count = backend.count
    rng = torch.Generator().manual_seed(0)
    lengths = [(count + n, 1) for n in (-2, -1, 0, 1, 8)]  # tokens before, tokens of the step
    lengths += [(0, count + 3), (count - 2, 5), (count + 7, 4)]
    blocks = iter(torch.randperm(60, generator=rng).tolist())
    sequences, start = [], 0
    for past, num_tokens in lengths:
        table = [next(blocks) for _ in range(-(-(past + num_tokens) // 4))]
        sequences.append(SequenceSpan(start, num_tokens, past + num_tokens, table))
        start += num_tokens
    indexer = layout.layers[0].indexer
    assert indexer is not None
    heads, width = indexer.num_heads, indexer.key_dim
    # Small integers: scores are exact, and equal ones many.
    arena.index_keys[0].copy_(torch.randint(-1, 2, arena.index_keys[0].shape, generator=rng))
    query = torch.randint(-1, 2, (1, start, heads, width), generator=rng).float()
    index = Index(query, query[:, :, 0], torch.ones(1, start, heads))

    step, _ = backend._launched_step(make_rows(sequences))
    backend._select(step, 0, index)

    per_block, per_token = row_steps(arena.layers[0])
    for seq in sequences:
        table = torch.tensor(seq.block_table)
        keys = arena.index_keys[0][table].flatten(0, 1)
        for i in range(seq.num_tokens):
            token, length = seq.start + i, seq.context_len - seq.num_tokens + i + 1
            scores = score_keys(query[0, token, None], torch.ones(1, heads), keys[:length])[0]
            best = sorted(range(length), key=lambda at, s=scores: (-s[at], at))[:count]
            rows = [seq.block_table[at // 4] * per_block + at % 4 * per_token for at in best]
            found = step.rows[token].tolist()
            kept = found[: min(length, count)]
            assert len(set(kept)) == len(kept) and set(kept) == set(rows)
            assert found[len(kept) :] == [-1] * (count - len(kept))


def test_what_the_kernels_cannot_select_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "why_not_planned", lambda *asked: None)
    layers = inspect_model(make_model("glm_moe_dsa")).layers
    device = torch.device("cuda")

    def why(**changes: Any) -> str | None:
        return why_unsupported([replace(layer, **changes) for layer in layers], device)

    assert why() is None  # although the second layer takes the selection of the first
    assert why(indexer=Indexer(4096, 8, 128)) == "a selection of 4096 tokens"
    assert why(indexer=Indexer(16, 8, 96)) == "an indexer's keys of 96 numbers"
    unlike = [layers[0], replace(layers[1], scaling=1.0)]
    reason = "layers that attend in different ways, some over latents"
    assert why_unsupported(unlike, device) == reason

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
    monkeypatch.setattr(kernels, "KernelBuild", list)
    assert start_kernels(layers, torch.float32, device) == [
        LatentKernelNeed(torch.float32),
        SelectionKernelNeed(),
    ]
    arena = SimpleNamespace(storage=SimpleNamespace(device=device))
    monkeypatch.setattr(choice, "SparseBackend", lambda *parts, **options: options["max_context"])
    assert choice.choose_backend(arena, layers, max_context=77) == 77  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("most_guessed", [None, pytest.param(256, marks=pytest.mark.many), 3])
def test_the_layers_of_a_model_share_compiled_code(most_guessed: int | None) -> None:
    """An `Index` goes through compiled layers, also to those that share a selection."""
    types = ["full", "shared", "full", "full", "shared", "shared"]
    model = make_model(
        "glm_moe_dsa", num_hidden_layers=6, indexer_types=types, mlp_layer_types=["dense"] * 6
    )
    layout = inspect_model(model)
    expected = paged_logits(model, layout, gather(layout))
    bind_guesses(model, most_guessed)
    register(traced=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=counter)

    got = paged_logits(model, layout, gather(layout))

    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # Of both kinds what is before attention and what is behind it, and the first layer, which is
    # handed no selection, once more. All of it twice where the last that selects has no guess.
    assert counter.frame_count <= (6 if most_guessed is None else 12)
