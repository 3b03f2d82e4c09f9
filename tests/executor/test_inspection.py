"""What a model's own code may do that a shared step, packed weights or sizes cannot bear."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hotset.cost.config_sizes import context_length, largest, num_experts
from hotset.errors import ModelError
from hotset.executor.probe import inspect_model
from hotset.linear.packed import PackedLinear, pack_linears
from hotset.linear.reads import is_replaceable, noting_reads

DECODERS = {
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
    "pegasus": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
    "blenderbot": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
}


def make_model(model_type: str, **sizes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, vocab_size=64, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", DECODERS)
def test_the_decoder_of_an_encoder_decoder_is_refused(family: str) -> None:
    model = make_model(family, **DECODERS[family])
    assert not model.config.is_encoder_decoder  # its class set that
    with pytest.raises(ModelError, match=r"takes no position_ids"):
        inspect_model(model)


class _Counting(nn.Module):
    """Adds what depends on a token's place in the step, as models that count positions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(-1) / 10


class _Shifting(nn.Module):
    """Mixes each row with the one before, as token shifts and short convolutions do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.roll(x, 1, dims=1)


@pytest.mark.parametrize("fault", [_Counting, _Shifting])
@pytest.mark.parametrize("place", ["before the first layer", "in the last norm"])
def test_a_token_that_depends_on_its_place_in_the_step_is_refused(
    fault: type[nn.Module], place: str
) -> None:
    model = make_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    inspect_model(model)
    inner: Any = model.model
    if place == "before the first layer":
        inner.embed_tokens = nn.Sequential(inner.embed_tokens, fault())
    else:
        inner.norm = nn.Sequential(inner.norm, fault())
    with pytest.raises(ModelError, match="place in the step"):
        inspect_model(model)


class _Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.asked, self.used = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.asked(x.to(self.asked.weight.dtype))
        return self.called(x) + nn.functional.linear(x, self.used.weight)


def test_layers_that_a_model_reads_itself_stay_as_they_are() -> None:
    model, x = _Reading(), torch.randn(1, 3, 8)
    with torch.inference_mode(), noting_reads(model):
        expected = model(x)
    assert is_replaceable(model.called)
    assert not is_replaceable(model.asked) and not is_replaceable(model.used)
    pack_linears(model)
    assert isinstance(model.called, PackedLinear)
    torch.testing.assert_close(model(x), expected)


def test_a_packed_layer_has_what_is_read_of_a_linear_layer() -> None:
    linear = nn.Linear(48, 80)
    packed = PackedLinear(linear)
    assert torch.equal(packed.weight, linear.weight)
    assert packed.bias is not None and torch.equal(packed.bias, linear.bias)
    assert (packed.in_features, packed.out_features) == (48, 80)


def test_sizes_that_are_lists_of_layers_values_count_as_their_largest() -> None:
    config = SimpleNamespace(intermediate_size=[48, 96], num_experts=[4, 8], top_k=2, other="x")
    assert [largest(config, name) for name in ("intermediate_size", "top_k")] == [96, 2]
    assert [largest(config, name) for name in ("other", "no_such_size")] == [0, 0]
    assert num_experts(config) == 8


class _FromTwoOn(nn.Module):
    """Rotary embeddings of positions that the model starts at 2 where none are given."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        is_own = x.shape[1] == position_ids.shape[1] == 3  # of the pass without positions
        return self.rotary(x, position_ids + 2 if is_own else position_ids)


def test_a_model_that_does_not_count_positions_from_0_on_is_refused() -> None:
    model = make_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    inner: Any = model.model
    inner.rotary_emb = _FromTwoOn(inner.rotary_emb)
    with pytest.raises(ModelError, match="numbers the positions"):
        inspect_model(model)


def test_a_window_that_only_the_config_has_is_refused() -> None:
    model = make_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model.config.sliding_window = 8
    with pytest.raises(ModelError, match="sliding_window 8"):
        inspect_model(model)
    model.config.sliding_window = context_length(model.config)
    inspect_model(model)


def test_a_context_ends_where_rotary_embeddings_change_for_all_that_share_a_step() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = AutoConfig.for_model(
        "phi3",
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters={**rope, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        pad_token_id=0,
    )
    assert context_length(config) == 64
    config.rope_parameters["rope_type"] = "yarn"
    assert context_length(config) == 512
