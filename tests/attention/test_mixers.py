"""Mixers whose state is lost on the way, or that keep more than is known, are refused."""

import functools
from typing import Any

import pytest
import torch
from hybrid_prompts import KINDS
from tiny_models import HYBRID_FAMILIES, make_model
from torch import nn
from transformers.models.bamba import modeling_bamba
from transformers.models.jamba import modeling_jamba

from hotset.errors import ModelError
from hotset.executor import state_check
from hotset.executor.probe import inspect_model


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_layers_with_and_without_kv_are_told_apart(family: str) -> None:
    model = make_model(family)
    layout = inspect_model(model)
    types = model.config.layer_types
    attends = [i for i, kind in enumerate(types) if kind in ("full_attention", "hybrid")]
    keeps = [i for i, kind in enumerate(types) if kind in ("linear_attention", "conv", "hybrid")]
    assert list(layout.kv_layers) == attends and list(layout.states) == keeps
    assert len(layout.layers) == len(layout.cache_specs) == len(attends)
    assert all(spec.conv_itemsize == 4 for spec in layout.states.values())
    has_scan = family not in ("lfm2", "lfm2_moe")
    assert layout.default_block_size == (64 if has_scan else 16)
    assert inspect_model(model) == layout  # hooked once, however often it is asked


@pytest.mark.parametrize("family", KINDS)
def test_without_a_step_a_hooked_model_is_what_it_was(family: str) -> None:
    tokens = torch.randint(3, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    model = make_model(family)
    with torch.inference_mode():
        expected = model(tokens).logits
        inspect_model(model)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(tokens).logits, expected)


def _mixer(model: Any) -> Any:
    layer = model.model.layers[0]
    return next(m for m in layer.children() if any(isinstance(c, nn.Conv1d) for c in m.children()))


@pytest.mark.parametrize("family", KINDS)
def test_a_layer_that_does_not_hand_on_its_keywords_is_refused(family: str) -> None:
    model = make_model(family)
    mixer = _mixer(model)
    forward = mixer.forward

    @functools.wraps(forward)
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        lost = ("hotset", "seq_idx", "attention_mask")
        return forward(*args, **{k: v for k, v in kwargs.items() if k not in lost})

    mixer.forward = forgetful
    with pytest.raises(ModelError, match=r"of type \w+ that keep a state .* \(first: layer 0\)"):
        inspect_model(model)


class _Remembering(nn.Module):
    """Adds to each row what the rows before it in the same call were, but for the probe's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        if x.shape[1] == 4:
            return out
        return out + torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)


@pytest.mark.parametrize("family", KINDS)
def test_a_state_outside_of_the_two_functions_is_found_by_a_trial(family: str) -> None:
    model: Any = make_model(family)
    inspect_model(model)
    mixer = _mixer(model)
    name = "in_proj_qkv" if family == "qwen3_5_text" else "in_proj"
    setattr(mixer, name, _Remembering(getattr(mixer, name)))
    with pytest.raises(ModelError, match="answers otherwise where a text is cut"):
        inspect_model(model)


def test_states_of_layers_that_a_trial_cannot_look_at_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state_check, "GradientCheckpointingLayer", nn.Conv3d)
    with pytest.raises(ModelError, match="outside of layers of transformers' own kind"):
        inspect_model(make_model("lfm2"))


def test_a_convolution_that_is_not_hooked_is_refused() -> None:
    model: Any = make_model("llama")
    model.model.layers[1].mlp.smooth = nn.Conv1d(4, 4, 3)
    with pytest.raises(ModelError, match="convolves over tokens in LlamaMLP"):
        inspect_model(model)


def test_a_scan_that_is_asked_for_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("bamba")
    inspect_model(model)
    scan = functools.partial(modeling_bamba.mamba2_chunk_scan, seq_lens=torch.ones(1))
    monkeypatch.setattr(modeling_bamba, "mamba2_chunk_scan", scan)
    monkeypatch.setattr(scan.func, "_asks_step", True)
    with pytest.raises(ModelError, match="BambaMixer asks for seq_lens"):
        inspect_model(model)


def test_a_scan_of_something_else_than_was_convolved_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("jamba")
    inspect_model(model)
    scan = modeling_jamba.mamba_selective_scan

    def other(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return scan(values.clone(), *args, **kwargs)

    monkeypatch.setattr(modeling_jamba, "mamba_selective_scan", other)
    with pytest.raises(ModelError, match="JambaMambaMixer scans something else than"):
        inspect_model(model)
