"""8-bit weights and KV, and float16, on an NVIDIA GPU: run these there with `pytest -m gpu`."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from engines import make_prompts, run
from paged import difference, gather, paged_logits
from tiny_models import make_model
from torch import nn
from transformers import PreTrainedModel

from hotset.attention.flashinfer.backend import FlashInferBackend
from hotset.engine.build import build_engine
from hotset.executor.probe import ModelLayout, inspect_model, weights_bytes
from hotset.linear.fp8 import FP8
from hotset.linear.fp8_linear import Fp8Linear, quantize_linears
from hotset.linear.merged import MergedLinear
from hotset.memory.arena import DeviceArena
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.units import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def calm_model(family: str) -> PreTrainedModel:
    """Its attention is not all or nothing, where the rounding of a single number would decide."""
    model = make_model(family, head_dim=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1)
    return model


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU that keeps 8-bit weights and inputs, with float32 for 16 bits."""
    twin = deepcopy(model).to("cpu")
    for module in twin.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype.itemsize == 2:
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype.itemsize == 2:
                setattr(module, name, buffer.float())
    return twin


def flashinfer(layout: ModelLayout) -> Callable[[DeviceArena], FlashInferBackend]:
    return lambda arena: FlashInferBackend(arena, layout.layers)


@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral", "gemma2"])
@pytest.mark.parametrize("scales", [None, [(0.5, 2.0), (1.0, 1.0), (3.0, 0.25)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_8_bit_kv_is_attended_to_as_by_sdpa_launched_and_recorded(
    family: str, scales: list[tuple[float, float]] | None, dtype: torch.dtype
) -> None:
    model = calm_model(family).to("cuda", dtype)
    layout = inspect_model(model)
    wide = paged_logits(model, layout, gather(layout))  # before layers are compiled
    twin = in_float32(model)
    exact_layout = inspect_model(twin, FP8)
    exact = paged_logits(twin, exact_layout, gather(exact_layout), scales=scales)
    exact = [logits.cuda() for logits in exact]
    layout = inspect_model(model, FP8)
    expected = paged_logits(model, layout, gather(layout), scales=scales)
    for recorded in (False, True):
        got = paged_logits(model, layout, flashinfer(layout), scales=scales, recorded=recorded)
        for true, one, other in zip(exact, expected, got, strict=True):
            # A last bit of 16 can be one of 8, so the two differ, but not in how much.
            assert difference(true, other) <= 2**0.5 * difference(true, one)
            if family != "gemma2":  # 4 % from float32 itself, so two of it differ by more
                assert difference(one, other) < 2.5e-2
    differences = [difference(one, other) for one, other in zip(wide, expected, strict=True)]
    assert 0 < max(differences) < 0.2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_float16_computes_what_sdpa_does_launched_and_recorded(family: str) -> None:
    model = calm_model(family).to("cuda", torch.float16)
    layout = inspect_model(model)
    expected = paged_logits(model, layout, gather(layout))
    for recorded in (False, True):
        got = paged_logits(model, layout, flashinfer(layout), recorded=recorded)
        for one, other in zip(expected, got, strict=True):
            assert difference(one, other) < 1e-2


@pytest.mark.parametrize("num_rows", [1, 7, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_an_8_bit_product_is_that_of_the_cpu(num_rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(512, 384, bias=bias, dtype=torch.bfloat16))
    x = torch.randn(num_rows, 512, dtype=torch.bfloat16)
    quantize_linears(holder)
    expected = holder(x)
    on_gpu = holder.to("cuda")
    got = on_gpu(x.to("cuda")).cpu()
    assert difference(expected.float(), got.float()) < 1e-2
    compiled = torch.compile(on_gpu, dynamic=True)(x.to("cuda")).cpu()
    assert difference(expected.float(), compiled.float()) < 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_8_bit_weights_compute_as_well_recorded_as_launched(family: str) -> None:
    model = calm_model(family).to("cuda", torch.bfloat16)
    layout = inspect_model(model)
    plain = paged_logits(model, layout, flashinfer(layout))
    quantize_linears(model)
    twin = in_float32(model)
    exact_layout = inspect_model(twin)
    exact = paged_logits(twin, exact_layout, gather(exact_layout))
    launched = paged_logits(model, layout, flashinfer(layout))
    recorded = paged_logits(model, layout, flashinfer(layout), recorded=True)
    assert any(isinstance(module, MergedLinear) for module in model.modules())
    for wide, true, one, other in zip(plain, exact, launched, recorded, strict=True):
        # What is fused rounds to 8 bits from other bits, so the two differ, but not in how much.
        true = true.cuda()
        assert difference(true, other) <= 2**0.5 * difference(true, one)
        assert difference(wide, other) < 0.25
        if family != "gemma2":  # 8 % from float32 itself
            assert difference(one, other) < 8e-2


def peak_device_bytes(load: Callable[[], PreTrainedModel]) -> tuple[int, int]:
    """Most bytes allocated during `load`, and what the weights take."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load()
    return torch.cuda.max_memory_allocated() - before, weights_bytes(model)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_go_to_the_gpu_once_and_are_those_of_the_file(tied: bool, tmp_path: Path) -> None:
    saved = make_model(
        "llama",
        head_dim=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        tie_word_embeddings=tied,
    ).to(torch.bfloat16)
    saved.save_pretrained(tmp_path, max_shard_size="50MB")
    tokens = torch.arange(3, 30).unsqueeze(0)
    with torch.inference_mode():
        expected = saved(tokens, use_cache=False).logits.float()
    largest = max(p.nbytes for p in saved.parameters())
    models = []

    def load(dtype: str) -> PreTrainedModel:
        model: PreTrainedModel = load_model(str(tmp_path), device="cuda", dtype=dtype).model
        models.append(model)
        return model

    peak_bytes, num_bytes = peak_device_bytes(lambda: load("auto"))
    assert peak_bytes < num_bytes + 5 * largest
    assert num_bytes > 20 * largest
    with torch.inference_mode():
        got = models[0](tokens.to("cuda"), use_cache=False).logits.float().cpu()
    assert difference(expected, got) < 0.1
    assert (models[0].lm_head.weight is models[0].model.embed_tokens.weight) == tied

    peak_bytes, small_bytes = peak_device_bytes(lambda: load("fp8"))
    assert small_bytes < 0.6 * num_bytes
    assert peak_bytes < small_bytes + 10 * largest
    assert sum(isinstance(m, Fp8Linear) for m in models[1].modules()) == 8 * 4


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float16", "auto"), ("float16", "fp8"), ("bfloat16", "fp8"), ("fp8", "auto"), ("fp8", "fp8")],
)
def test_the_engine_answers_and_preempts_in_any_of_them(
    dtype: str, kv_dtype: str, eager: bool, tmp_path: Path
) -> None:
    calm_model("llama").save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cuda", dtype=dtype)
    value_bytes = 1 if kv_dtype == "fp8" else 2
    block_bytes = 4 * 2 * 2 * 128 * 3 * value_bytes
    config = Options.of(
        dtype=dtype,  # type: ignore[arg-type]
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        device="cuda",
        eager=eager,
        hot_gib=26.5 * block_bytes / GIB,
        host_gib=0.05,
        block_size=4,
        max_model_len=96,
        max_num_batched_tokens=32,
        fetch_policy="fetch",
    )
    engine = build_engine(config, loaded)
    engine.scheduler.ahead_tokens = 1  # so that some are preempted
    try:
        assert engine.sizes.block_bytes == block_bytes
        first = run(engine, make_prompts())
        second = run(engine, make_prompts())
        assert engine.metrics.preemptions > 0
        assert engine.metrics.cached_tokens["host"] > 0
    finally:
        engine.close()
    # Products of other shapes round in another way: most answers are equal, not all need be.
    assert all(len(tokens) == 12 for tokens in first + second)
    same = sum(
        a == b for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert same > 0.5 * 12 * len(first)
