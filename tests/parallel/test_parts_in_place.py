"""Weights of a rank that are read straight to their place are those that cutting a model leaves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

from hotset.checkpoint.tensors import CheckpointTensors
from hotset.layout import Layout
from hotset.linear.fp8_linear import Fp8Linear, quantize_linears
from hotset.linear.merged import MergedLinear, merge_linears
from hotset.model import checkpoint, weights
from hotset.model.cut_model import ModelCutter
from hotset.parallel import group

CPU = torch.device("cpu")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-mqa", "gemma2"])
def test_each_rank_reads_its_part(
    family: str, fp8: bool, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": True}
    whole = make_model(family, **sizes)
    whole.save_pretrained(tmp_path)
    monkeypatch.setattr(group, "_current", group.Group(rank, Layout(2), CPU, True))
    made_by = checkpoint.read_architecture(tmp_path)
    tensors = CheckpointTensors(tmp_path, made_by.fields)
    cutter = ModelCutter(whole, family)
    read = weights.load_in_place(made_by, tensors, CPU, torch.float32, fp8=fp8, cutter=cutter)
    expected = copy.deepcopy(whole)
    if fp8:
        quantize_linears(expected)  # whole rows, which then are cut
    cutter.cut_all(expected)
    merge_linears(expected)
    ours, theirs = (dict(model.named_parameters()) for model in (read, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name].float(), weight.float()), name
    kinds = [type(module) for module in read.modules()]
    assert MergedLinear in kinds and (Fp8Linear in kinds) == fp8
    assert _bytes(read) < 0.8 * _bytes(whole) or fp8


def _bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
