"""Keys and values in 8-bit floats, on the CPU: stored as the reference says, moved bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_prompts, run
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from hotset.attention.gather import GatherBackend
from hotset.attention.inputs import copy_batch
from hotset.attention.spec import LayerAttention
from hotset.cost.cache_spec import KeysValues
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.load import load_engine
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.errors import ConfigError, ModelError
from hotset.executor.probe import inspect_model
from hotset.linear.fp8 import FP8, to_fp8
from hotset.memory.arena import DeviceArena
from hotset.model.devices import check_rounded_inputs, resolve_dtype, resolve_kv_dtype
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.sequence import Request
from hotset.units import GIB

MakeEngine = Callable[..., Engine]


def test_a_number_beyond_the_range_becomes_the_largest_and_nan_stays() -> None:
    values = torch.tensor([0.0, 1.0, -500.0, torch.inf, torch.nan])
    stored = to_fp8(values, 1.0).float()
    assert stored[:4].tolist() == [0.0, 1.0, -448.0, 448.0]
    assert stored[4].isnan()
    assert to_fp8(values[1:3], 2.0).float().tolist() == [0.5, -256.0]  # -250 rounded


@pytest.mark.parametrize("scales", [None, [(0.5, 4.0)]])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_is_that_over_rounded_keys_and_values(
    scales: list[tuple[float, float]] | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    num_tokens, key_scale, value_scale = 11, *((scales or [(1.0, 1.0)])[0])
    request = Request("a", num_tokens, list(range(num_tokens)), SamplingParams(), 16)
    request.kv.block_table = [2, 0, 1]
    query = torch.randn(4, num_tokens, 16)
    key, value = torch.randn(2, 2, num_tokens, 16)
    asked = LayerAttention(KeysValues(2, 16, 16), 4, 0.25, softcap, torch.float32)

    def attend(dtype: torch.dtype, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        arena = DeviceArena(
            [asked.cache],
            num_blocks=3,
            block_size=4,
            dtype=dtype,
            device=torch.device("cpu"),
            scales=scales if dtype == FP8 else None,
        )
        batch = make_step_input(Step([StepItem.of(request, 0, num_tokens)]), 4).batch
        inputs, _ = copy_batch(batch, torch.device("cpu"))
        return GatherBackend(arena, [asked]).begin_step(batch, inputs).attend(0, query, key, value)

    rounded_key = to_fp8(key, key_scale).float() * key_scale
    rounded_value = to_fp8(value, value_scale).float() * value_scale
    expected = attend(torch.float32, rounded_key, rounded_value)
    torch.testing.assert_close(attend(FP8, key, value), expected)
    assert not torch.allclose(expected, attend(torch.float32, key, value), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_tokens_are_the_same_with_any_tiers_and_preemption(
    family: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    prompts = make_prompts()
    roomy = make_engine(family, kv_dtype="fp8", hot_blocks=200, kv_bytes=1)
    starved = make_engine(
        family,
        kv_dtype="fp8",
        kv_bytes=1,
        hot_blocks=26,
        host_blocks=5,
        disk_mib=8,
        fetch_policy="fetch",
        disk_path=tmp_path,
        max_num_batched_tokens=32,
    )
    starved.scheduler.ahead_tokens = 1  # so that some are preempted
    expected = run(roomy, prompts)
    for _ in range(2):
        assert run(starved, prompts) == expected
    assert starved.metrics.preemptions > 0
    assert sum(starved.metrics.cached_tokens[tier] for tier in ("host", "disk")) > 0


def test_a_block_takes_a_quarter_of_its_bytes_in_float32(make_engine: MakeEngine) -> None:
    whole = make_engine("llama")
    small = make_engine("llama", kv_dtype="fp8", kv_bytes=1)
    assert 4 * small.sizes.block_bytes == whole.sizes.block_bytes
    assert small.kv.prefixes.fingerprint != whole.kv.prefixes.fingerprint


def test_scales_of_a_checkpoint_are_found_and_change_what_is_stored(tmp_path: Path) -> None:
    folder = tmp_path / "calibrated"
    make_model("llama").save_pretrained(folder)
    assert load_model(str(folder), device="cpu", dtype="auto").kv_scales is None

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_scale"] = torch.tensor(0.25)
    weights["model.layers.2.self_attn.attn.v_scale"] = torch.tensor([2.0])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(folder), device="cpu", dtype="auto")
    assert loaded.kv_scales == ((0.25, 1.0), (1.0, 1.0), (1.0, 2.0))
    options: dict[str, Any] = {"hot_gib": 2**20 / GIB, "max_model_len": 64}
    engine = build_engine(Options.of(kv_dtype="fp8", **options), loaded)
    assert engine.executor.runner._arena.scales == list(loaded.kv_scales)
    engine.close()
    engine = build_engine(Options.of(**options), loaded)
    assert engine.executor.runner._arena.scales == [(1.0, 1.0)] * 3  # nothing is rounded
    engine.close()

    weights["model.layers.0.self_attn.k_scale"] = torch.tensor(0.0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"k_scale is 0\.0, expected one above 0"):
        load_model(str(folder), device="cpu", dtype="auto")


def test_a_gpu_without_8_bit_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match="kv_dtype is fp8, which NVIDIA A100 does not"):
        resolve_kv_dtype("fp8", torch.device("cuda"))
    with pytest.raises(ConfigError, match="dtype is fp8, which NVIDIA A100 does not"):
        resolve_dtype("fp8", torch.device("cuda"))
    with pytest.raises(ConfigError, match="activations is 8, which NVIDIA A100 does not"):
        check_rounded_inputs(torch.device("cuda"), "auto")
    assert resolve_kv_dtype("auto", torch.device("cuda")) is None


def test_inputs_in_8_bits_are_refused_where_no_kernel_rounds_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="activations is 8, but device is cpu"):
        load_model(str(tmp_path), device="cpu", dtype="auto", activations="8")
    with pytest.raises(ConfigError, match="activations is 8, but dtype is fp8"):
        check_rounded_inputs(torch.device("cuda"), "fp8")
    with pytest.raises(ConfigError, match="activations is 8 and expert_cpu is auto"):
        Options.of(activations="8", expert_cpu="auto", expert_slots=4)


def test_latents_are_not_rounded_and_say_so_before_weights_are_read(tmp_path: Path) -> None:
    model = make_model("deepseek_v3")
    words = "kv_dtype is fp8, but DeepseekV3ForCausalLM caches latents .* expected auto"
    with pytest.raises(ConfigError, match=words):
        inspect_model(model, FP8)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=words):
        load_engine(Options.of(model=str(tmp_path), device="cpu", kv_dtype="fp8"))


def test_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_dtype is 'int8'; expected auto or fp8"):
        Options.of(kv_dtype="int8")  # type: ignore[arg-type]
