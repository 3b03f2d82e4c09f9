"""Linear layers of 8-bit weights: as the reference says, merged or not, from any checkpoint."""

from pathlib import Path

import pytest
import torch
from engines import make_prompts, run
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from torch import nn

from hotset.engine.build import build_engine
from hotset.executor.probe import weights_bytes
from hotset.linear.fp8 import FP8
from hotset.linear.fp8_linear import Fp8Linear, can_be_fp8, quantize_linears, row_scales
from hotset.linear.merged import MergedLinear, merge_linears
from hotset.model.dummy import load_dummy
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.units import GIB

TOKENS = torch.arange(3, 30).unsqueeze(0)


def quantized(linear: nn.Linear) -> Fp8Linear:
    holder = nn.Sequential(linear)
    quantize_linears(holder)
    layer = holder[0]
    assert isinstance(layer, Fp8Linear)
    return layer


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_rounded_numbers(num_rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight[5] *= 1000  # a row of another size has a scale of its own
    linear.weight[6] = 0
    x = torch.randn(2, num_rows, 64, dtype=torch.bfloat16)
    x[0, 0] *= 100
    layer = quantized(linear)

    scale = row_scales(x)
    x8 = (x.float() / scale).to(FP8).double() * scale
    expected = x8 @ (layer.weight.double() * layer.scale).t()
    if linear.bias is not None:
        expected += linear.bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)
    plain = linear(x).double()
    assert (layer(x) - plain).norm() < 0.1 * plain.norm()
    assert (layer.weight.float() * layer.scale - linear.weight.float()).norm() < (
        0.03 * linear.weight.float().norm()
    )


def test_a_large_weight_is_rounded_in_pieces_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    whole = quantized(linear)
    monkeypatch.setattr("hotset.linear.fp8_linear._PIECE_VALUES", 64 * 7)
    pieces = quantized(linear)
    assert torch.equal(whole.weight.view(torch.uint8), pieces.weight.view(torch.uint8))
    assert torch.equal(whole.scale, pieces.scale)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "granitemoe"])
def test_a_model_computes_nearly_the_same_and_merging_changes_nothing(family: str) -> None:
    model = make_model(family).to(torch.bfloat16)
    with torch.no_grad():  # attention that is not all or nothing, where rounding would decide
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1)
    with torch.inference_mode():
        expected = model(TOKENS, use_cache=False).logits.float()
    before = weights_bytes(model)
    names = can_be_fp8(model)
    assert "lm_head" not in names
    assert not any("router" in name or name.endswith(".gate") for name in names)
    quantize_linears(model)
    assert not can_be_fp8(model)
    assert weights_bytes(model) < before
    with torch.inference_mode():
        got = model(TOKENS, use_cache=False).logits.float()
        merge_linears(model)
        merged = model(TOKENS, use_cache=False).logits.float()
    assert sum(isinstance(m, MergedLinear) for m in model.modules()) >= 9
    assert 0 < (got - expected).norm() < 0.25 * expected.norm()
    torch.testing.assert_close(merged, got)


def test_sizes_that_the_product_does_not_know_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(32, 32))
    assert list(can_be_fp8(model)) == ["2"]


def test_the_engine_answers_the_same_with_any_tiers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    answers = []
    for hot_blocks, host_gib in ((200, 0.0), (26, 0.01)):
        loaded = load_model(str(folder), device="cpu", dtype="fp8")
        assert sum(isinstance(m, Fp8Linear) for m in loaded.model.modules()) == 3 * 4
        block_bytes = 4 * 2 * 2 * 16 * 2 * 3
        config = Options.of(
            dtype="fp8",
            hot_gib=hot_blocks * block_bytes / GIB,
            host_gib=host_gib,
            block_size=4,
            max_model_len=96,
        )
        engine = build_engine(config, loaded)
        engine.scheduler.ahead_tokens = 1  # so that some are preempted
        answers.append(run(engine, make_prompts()))
        assert (engine.metrics.preemptions > 0) == (host_gib > 0)
        engine.close()
    assert answers[0] == answers[1]
    plain = load_model(str(folder), device="cpu", dtype="bfloat16")
    assert plain.fingerprint != loaded.fingerprint


def test_a_checkpoint_in_8_bits_with_scales_of_blocks_is_read(tmp_path: Path) -> None:
    """As DeepSeek-V3 and Qwen3-FP8 have them: `weight_scale_inv` for blocks of a weight."""
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    stored = {}
    for name, weight in plain.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        blocks = weight.view(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        rounded = (blocks / scale[:, None, :, None]).to(FP8)
        stored[name] = rounded.view(weight.shape)
        stored[f"{name}_scale_inv"] = scale
        plain[name] = (rounded.float() * scale[:, None, :, None]).view(weight.shape)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    model.config.save_pretrained(tmp_path)

    loaded = load_model(str(tmp_path), device="cpu", dtype="float32").model
    for name, tensor in loaded.state_dict().items():
        if name in plain:
            torch.testing.assert_close(tensor, plain[name], rtol=1e-2, atol=1e-3)
    again = load_model(str(tmp_path), device="cpu", dtype="fp8").model
    assert sum(isinstance(m, Fp8Linear) for m in again.modules()) == 3 * 4  # siblings are one
    names = [name.removesuffix(".weight") for name in plain if "_proj" in name]
    assert len(names) == 3 * 7
    for name in names:
        layer, rows = again.get_submodule(name), slice(None)
        if isinstance(layer, MergedLinear):
            layer, rows = layer.whole, layer.columns
        scale, expected = layer.scale[rows], plain[f"{name}.weight"]
        values = layer.weight.float()[rows] * scale
        assert ((values - expected).abs() <= expected.abs() / 14 + scale * 2**-9).all()


def test_random_weights_in_8_bits(tmp_path: Path) -> None:
    make_model("llama").config.save_pretrained(tmp_path)
    one = load_dummy(str(tmp_path), device="cpu", dtype="fp8")
    other = load_dummy(str(tmp_path), device="cpu", dtype="bfloat16")
    assert weights_bytes(one.model) < weights_bytes(other.model)
    assert one.fingerprint != other.fingerprint
