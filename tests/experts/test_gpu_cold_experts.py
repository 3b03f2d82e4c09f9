"""Experts on disk, and computed by the CPU, beside an NVIDIA GPU: run with `pytest -m gpu`."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_slots, run
from paged import difference
from test_gpu_experts import chain, make_pair, routed

from hotset.cost.cold_experts import MOST_TOKENS
from hotset.engine.engine import Engine
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.disk import DiskExperts
from hotset.experts.host import HostExperts
from hotset.experts.store import ExpertStore
from hotset.experts.weights import Hosted, experts_of
from hotset.options import Options
from hotset.units import GIB

MakeEngine = Callable[..., Engine]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
PROMPTS = [[5, 9, 13, 200, 7], [31] * 20, [77, 3, 250]]


def to_disk(layers: list[Any], folder: Path, *, host_slots: int, num_slots: int) -> ExpertBuffer:
    """Move layers from host memory to disk."""
    experts = [experts_of(layer) for layer in layers]
    store = ExpertStore(
        folder,
        experts[0].layout,
        num_layers=len(layers),
        num_experts=experts[0].num_experts,
        num_slots=host_slots,
        read_deadline_s=60.0,
    )
    for number, each in enumerate(experts):
        assert each.hosted is not None and isinstance(each.hosted.source, HostExperts)
        store.write_layer(number, *each.hosted.source.matrices())
        each.state = Hosted(DiskExperts(store, number))
    return make_slots(experts, Options.of(expert_slots=num_slots), torch.device("cuda"))


def make_copies_slow(buffer: ExpertBuffer) -> None:
    """Have the CPU compute the tiny experts of a test, whose copies take less time."""
    cold = buffer._cold
    assert cold is not None and cold.cost is not None
    cold.cost = replace(cold.cost, copy_s=1.0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("host_slots", [2, 9, 30])
@pytest.mark.parametrize("num_slots", [1, 4, 11])
@torch.inference_mode()
def test_experts_on_disk_have_the_bits_of_resident_ones(
    num_slots: int, host_slots: int, fused: bool, tmp_path: Path
) -> None:
    resident, layers, in_memory = make_pair(fused=fused, expert_slots=num_slots)
    in_memory.close()
    buffer = to_disk(layers, tmp_path, host_slots=host_slots, num_slots=num_slots)
    assert buffer.store is not None
    for num_tokens in (1, 40, 2, 1, 300, 1):
        step = routed(num_tokens)
        assert torch.equal(chain(layers, *step), chain(resident, *step))
        torch.cuda.synchronize()
        buffer.store.check()
    counts = buffer.counts()
    assert counts.expert_disk_reads > 0
    buffer.close(with_disk=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["auto", "on"])
@torch.inference_mode()
def test_the_cpu_computes_cold_experts_within_rounding(mode: str, fused: bool) -> None:
    resident, layers, buffer = make_pair(fused=fused, expert_slots=3, expert_plan="cache")
    in_float32 = [copy.deepcopy(layer).to("cpu", torch.float32) for layer in resident]
    first = routed(2)
    assert chain(layers, *first).isfinite().all()
    said = buffer.compute_cold_on_cpu(mode)
    assert f"cold experts on the CPU, {mode}" in said
    assert all(map(buffer.launches, range(1, MOST_TOKENS + 1))) or mode == "auto"
    make_copies_slow(buffer)
    for num_tokens in (1, 4, MOST_TOKENS, 300, 2):
        step = routed(num_tokens)
        x, ids, weights = (part.cpu() for part in step)
        exact = chain(in_float32, x.float(), ids, weights.float())
        rounded = difference(exact, chain(resident, *step).cpu())
        # One rounding more at most, whose error is as large and independent.
        assert difference(exact, chain(layers, *step).cpu()) < 2**0.5 * rounded
    if mode == "on":
        assert buffer.counts().expert_cpu_computed > 0
    for layer in layers:
        experts_of(layer).buffer.table.check()
    buffer.close()


@pytest.mark.parametrize("eager", [False, True])
def test_an_engine_answers_the_same_with_experts_on_disk(
    eager: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"device": "cuda", "eager": eager, "expert_slots": 2}
    expected = run(make_engine("qwen3_moe", expert_plan="cache", **options), PROMPTS)
    engine = make_engine(
        "qwen3_moe", expert_host_gib=5 * 24 * 1024 / GIB, expert_disk_path=tmp_path, **options
    )
    assert run(engine, PROMPTS) == expected
    assert engine.metrics.expert_disk_reads > 0 and not engine.metrics.faults


@pytest.mark.parametrize("cold_dtype", ["auto", "fp8", "int4"])
def test_an_engine_runs_with_the_cpu_taking_part(cold_dtype: str, make_engine: MakeEngine) -> None:
    engine = make_engine(
        "qwen3_moe",
        device="cuda",
        expert_slots=2,
        expert_plan="cache",
        expert_cpu="on",
        expert_cold_dtype=cold_dtype,
    )
    assert "cold experts on the CPU, on: steps of 1 to 64 tokens" in engine.report
    assert engine.experts is not None
    make_copies_slow(engine.experts)
    answers = run(engine, PROMPTS)
    assert [len(answer) for answer in answers] == [12] * len(PROMPTS)
    assert engine.metrics.expert_cpu_computed > 0
