"""Attention over latents by FlashInfer on the CPU: its wrapper is a fake, the rest as on a GPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from fake_flashinfer import FakeRecorder
from fake_latents import CpuLatents
from paged import gather, paged_logits
from tiny_models import LATENT_FAMILIES, make_model

from hotset.attention import choice
from hotset.attention.backend import AttentionBackend
from hotset.attention.flashinfer import kernels
from hotset.attention.flashinfer import latent as flashinfer_latent
from hotset.attention.flashinfer import long_prompts as decisions
from hotset.attention.flashinfer.kernels import (
    LatentKernelNeed,
    RaggedKernelNeed,
    start_kernels,
    why_unsupported,
)
from hotset.executor import graphs as graphs_module
from hotset.executor.probe import inspect_model
from hotset.memory.arena import DeviceArena


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_a_model_computes_launched_and_recorded_what_it_does_over_gathered_rows(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "GraphRecorder", FakeRecorder)
    model = make_model(family)
    layout = inspect_model(model)
    made: list[CpuLatents] = []

    def backend(most_rows: int) -> Callable[[DeviceArena], AttentionBackend]:
        def make(arena: DeviceArena) -> AttentionBackend:
            made.append(CpuLatents(arena, layout.layers, most_rows=most_rows))
            return made[-1]

        return make

    expected = paged_logits(model, layout, gather(layout))
    is_dense = family in ("youtu", "minicpm3")  # a tape does not hold what a router chooses
    for recorded, most_rows in ((False, 256), (False, 9), (is_dense, 256)):
        got = paged_logits(model, layout, backend(most_rows), recorded=recorded, compiles=False)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert [len(one._wrappers) for one in made] == [1, 4, 1]  # 29 rows in parts of 9


@pytest.mark.parametrize("family", ["youtu", "deepseek_v2", "minicpm3"])
@pytest.mark.parametrize("piece_tokens", [4, 7, 64])
@pytest.mark.parametrize("most_rows", [2, 256])
def test_long_prompts_attend_to_keys_and_values_as_over_gathered_rows(
    family: str, piece_tokens: int, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "GraphRecorder", FakeRecorder)
    monkeypatch.setattr(decisions, "_LAUNCH_OPERATIONS", 0.0)
    monkeypatch.setattr(decisions, "_PROMPT_OPERATIONS", 0.0)
    monkeypatch.setattr(decisions, "can_expand", lambda heads: True)
    monkeypatch.setattr(decisions, "saved_operations", lambda spec, tokens, past: tokens + past)
    model = make_model(family)
    layout = inspect_model(model)
    made: list[CpuLatents] = []

    def make(arena: DeviceArena) -> AttentionBackend:
        made.append(
            CpuLatents(
                arena,
                layout.layers,
                most_rows=most_rows,
                expands=True,
                piece_tokens=piece_tokens,
            )
        )
        return made[-1]

    expected = paged_logits(model, layout, gather(layout))
    for recorded in (False, most_rows == 256 and family != "deepseek_v2"):
        got = paged_logits(model, layout, make, recorded=recorded, compiles=False)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert all(len(backend.expanded._wrappers) > 1 for backend in made)


def test_a_kernel_for_long_prompts_that_fails_leaves_them_absorbed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layout = inspect_model(make_model("youtu"))
    arena = DeviceArena(
        layout.cache_specs,
        num_blocks=2,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    backend = CpuLatents(arena, layout.layers)
    monkeypatch.setattr(flashinfer_latent, "can_expand", lambda heads: True)
    backend._expands = None
    assert backend.use_all_kernels(waits=False) and backend._expands is True

    def fail(*parts: object, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(backend.expanded, "plan", fail)
    backend._expands = None
    assert backend.use_all_kernels(waits=True) and backend._expands is False
    assert "long prompts attend to latents, which is slower" in caplog.text


def test_rows_beyond_a_recorded_step_stay_finite_and_are_not_planned() -> None:
    layout = inspect_model(make_model("deepseek_v3"))
    arena = DeviceArena(
        layout.cache_specs,
        num_blocks=9,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    backend = CpuLatents(arena, layout.layers)
    mixed = backend.record_mixed(
        max_num_seqs=3,
        max_num_tokens=8,
        block_ids=torch.zeros(20, dtype=torch.int32),
        scratch_block=8,
    )
    mixed.plan_nothing()
    query = torch.full((8, 4, 24), torch.nan)
    query[0] = 1.0
    assert mixed.run(0, query).isfinite().all()


def test_layers_with_latents_are_built_and_served_by_a_backend_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, wide = (
        inspect_model(make_model("deepseek_v3", **sizes).to(torch.bfloat16)).layers
        for sizes in ({}, {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64})
    )
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_unsupported(wide, cuda) is None
    assert why_unsupported(small, cuda) == "latents of 16 and 8 numbers"
    without = inspect_model(make_model("llama").to(torch.bfloat16)).layers
    mixed = why_unsupported([*wide, *without], cuda)
    assert mixed == "layers that attend in different ways, some over latents"

    monkeypatch.setitem(__import__("sys").modules, "flashinfer", SimpleNamespace())
    monkeypatch.setattr(kernels, "KernelBuild", list)
    need = LatentKernelNeed(torch.bfloat16)
    assert start_kernels(wide, torch.bfloat16, cuda) == [need]  # no kernel has such keys
    monkeypatch.setattr(kernels, "can_expand", lambda heads: True)
    ragged = RaggedKernelNeed(torch.bfloat16, 16 + 64, 16)
    assert start_kernels(wide, torch.bfloat16, cuda) == [need, ragged]
    assert start_kernels(small, torch.bfloat16, cuda) is None

    arena = SimpleNamespace(storage=SimpleNamespace(device=cuda))
    for name in ("FlashInferBackend", "LatentBackend"):
        monkeypatch.setattr(choice, name, lambda *parts, _name=name, **options: _name)
    assert choice.choose_backend(arena, wide, max_context=96) == "LatentBackend"  # type: ignore[arg-type]
