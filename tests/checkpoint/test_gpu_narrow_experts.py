"""Checkpoints with narrow experts on an NVIDIA GPU: run with `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run
from test_narrow_experts import FORMS, PROMPTS, options, save

from hotset.engine.load import load_engine
from hotset.experts.gating import dynamic_experts, use_dynamic_gating
from hotset.experts.weights import Narrow, experts_layers
from hotset.kernels.narrow_forms import Gate
from hotset.model.loader import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
GPU = {"device": "cuda", "dtype": "bfloat16"}


def answers(folder: Path, **changes: Any) -> list[list[int]]:
    """In steps of one request and of all; the payloads of the files are wherever experts are."""
    engine, loaded = load_engine(options(folder, **GPU, **changes))
    try:
        for layer in experts_layers(loaded.model):
            narrow = layer.narrow
            assert narrow is not None
            if engine.experts is None:  # none in host memory
                assert isinstance(layer.state, Narrow) and layer.state.payloads.is_cuda
            else:
                assert layer.buffer.slots.payloads is not None
                assert layer.buffer.slots.payloads.shape[1] == narrow.payload_bytes
        gate = experts_layers(loaded.model)[0].gate
        assert gate is not None and bool(gate.alpha) == (
            loaded.model.config.model_type == "gpt_oss"
        )
        assert gate == Gate() or gate.limit == 7.0
        return run(engine, PROMPTS[:1]) + run(engine, PROMPTS)
    finally:
        engine.close()


@pytest.mark.parametrize("form", FORMS)
def test_answers_do_not_depend_on_where_narrow_experts_are(form: str, tmp_path: Path) -> None:
    save(form, tmp_path / "model")
    expected = answers(tmp_path / "model", resident=True)  # as they come from the files
    for changes in (
        {},  # all in host memory first, and then on the device
        {"expert_slots": 2, "expert_plan": "cache"},
        {"expert_slots": 1, "expert_plan": "stream"},
        {"expert_slots": 2},
    ):
        assert answers(tmp_path / "model", **changes) == expected, changes


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_layers_compute_what_widened_ones_do(form: str, tmp_path: Path) -> None:
    save(form, tmp_path)
    wide = load_model(str(tmp_path), device="cpu", dtype="bfloat16").model.to("cuda")
    use_dynamic_gating(wide)
    assert experts_layers(wide)[0].narrow is None
    engine, loaded = load_engine(options(tmp_path, **GPU, expert_slots=2))
    for one, other in zip(experts_layers(loaded.model), experts_layers(wide), strict=True):
        x = torch.randn(9, loaded.model.config.hidden_size, device="cuda").bfloat16()
        weights, ids = torch.randn(9, one.num_experts, device="cuda").softmax(-1).topk(2)
        step = x, ids, weights.bfloat16()
        got, expected = (dynamic_experts(each.module, *step).float() for each in (one, other))
        assert (got - expected).norm() <= 1e-2 * expected.norm()
    engine.close()
