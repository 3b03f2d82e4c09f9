"""Quantised checkpoints over two ranks: slices of experts keep the files' numbers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run
from rank_engines import load_folder, make_folder_engine
from test_narrow_experts import FORMS, PROMPTS, save

from hotset.cost.layout import Layout
from hotset.engine.load import load_engine
from hotset.errors import ModelError
from hotset.experts.host import HostExperts
from hotset.experts.narrow import NarrowLayout
from hotset.experts.slices import ExpertSlice
from hotset.experts.weights import LayerExperts, Narrow, experts_layers
from hotset.model import dummy
from hotset.model.dummy import load_dummy
from hotset.options import Options
from hotset.parallel import group
from hotset.ranks.driver import Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(Layout(2), "cpu", step_timeout_s=60.0)
    yield ranks
    ranks.close()


def options(folder: Path, **changes: Any) -> Options:
    sizes = {"device": "cpu", "max_model_len": 64, "hot_gib": 0.02, "expert_slots": 1}
    return Options.of(model=str(folder), **{**sizes, **changes})


def on_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[list[list[int]], Any]:
    """What one rank answers, and its model."""
    with monkeypatch.context() as patch:
        patch.setattr(group, "_current", group._ONE)
        engine, loaded = load_engine(options(folder, **changes))
        with contextlib.closing(engine):
            return run(engine, PROMPTS), loaded.model


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=() if form in ("mxfp4", "fp8_block", "awq") else pytest.mark.many)
        for form in FORMS
    ],
)
def test_slices_in_few_bits_answer_as_whole_experts_do(
    form: str, pair: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(form, tmp_path)
    expected, model = on_one(tmp_path, monkeypatch)
    whole = [layer.source for layer in experts_layers(model)]
    with contextlib.closing(make_folder_engine(pair, options(tmp_path, tp=2))) as engine:
        assert run(engine, PROMPTS) == expected
        runner: Any = engine.executor.local.runner  # type: ignore[attr-defined]
        slices = [layer.source for layer in experts_layers(runner._model)]
    for ours, theirs in zip(slices, whole, strict=True):
        assert isinstance(ours, HostExperts) and isinstance(theirs, HostExperts)
        assert ours.narrow is not None and theirs.narrow is not None
        down = theirs.matrices()[1]
        assert torch.equal(ours.matrices()[1], down[:, :, : down.shape[2] // 2])
        assert ours.narrow.weight_bytes < 0.7 * theirs.narrow.weight_bytes


def test_matrices_in_blocks_answer_as_on_one_rank(
    pair: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("fp8_block", tmp_path)
    changes = {"expert_slots": None, "allow_widening": True}
    expected, _ = on_one(tmp_path, monkeypatch, **changes)
    engine = make_folder_engine(pair, options(tmp_path, tp=2, **changes))
    with contextlib.closing(engine):
        assert run(engine, PROMPTS) == expected


def test_a_slice_that_ends_within_a_byte_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("mxfp4", tmp_path)
    monkeypatch.setattr(ExpertSlice, "narrow", lambda *_: None)
    monkeypatch.setattr(group, "_current", group.Group(0, Layout(2), CPU, True))
    words = "experts, such as .* cannot stay as they are there: .* end within a byte; .* give "
    with pytest.raises(ModelError, match=words):
        load_folder(options(tmp_path, tp=2))


@pytest.mark.parametrize("rank", [0, 1])
def test_random_experts_in_few_bits_are_slices_of_those_of_one_rank(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("mxfp4", tmp_path)

    def hold(experts: LayerExperts, narrow: NarrowLayout, device: torch.device) -> NarrowLayout:
        return narrow  # as slots of a GPU do

    monkeypatch.setattr(dummy, "slots_hold", hold)
    models = []
    for of in (group._ONE, group.Group(rank, Layout(2), CPU, True)):
        with monkeypatch.context() as patch:
            patch.setattr(group, "_current", of)
            models.append(load_dummy(str(tmp_path), device="cpu", dtype="bfloat16").model)
    for whole, part in zip(*map(experts_layers, models), strict=True):
        assert isinstance(whole.state, Narrow) and isinstance(part.state, Narrow)
        (up, down), (our_up, our_down) = (
            each.state.narrow.dequantise(each.state.payloads, torch.float32)
            for each in (whole, part)
        )
        middle = down.shape[2] // 2
        mine = slice(rank * middle, (rank + 1) * middle)
        assert torch.equal(our_down, down[:, :, mine])
        assert torch.equal(our_up, up[:, 2 * mine.start : 2 * mine.stop])
        assert part.biases is not None and part.biases[0].shape[1] == 2 * middle
