"""Slots that hold experts as a checkpoint has them, as on a GPU, in Triton's interpreter."""

from typing import Any

import pytest
import torch
from engines import make_slots
from expert_layers import HIDDEN, NUM_EXPERTS, PLAIN, computed, make_layers, routed
from torch import nn

from hotset.errors import ModelError
from hotset.experts import hosting, sizes
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.gating import dynamic_experts
from hotset.experts.host import ExpertLayout, HostExperts
from hotset.experts.narrow import NarrowLayout
from hotset.experts.random_payloads import random_payloads
from hotset.experts.weights import Narrow, Shard, experts_of
from hotset.kernels import narrow_experts
from hotset.memory.region import SharedRegion
from hotset.options import Options
from hotset.weight_format import FP8_BLOCK, MXFP4, WeightFormat

MIDDLE = 24
FORMS = [FP8_BLOCK, MXFP4, WeightFormat("int4", "float16", 1, 32, has_zeros=True)]
WAYS: list[dict[str, Any]] = [
    {"expert_slots": 2, "expert_plan": "cache"},
    {"expert_slots": 5, "expert_plan": "auto"},
    {"expert_slots": 2, "expert_plan": "stream"},
    {"expert_slots": 0, "expert_plan": "stream"},
]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hosting, sizes):
        monkeypatch.setattr(module, "slots_hold", lambda experts, narrow, device: narrow)
    monkeypatch.setattr(hosting, "can_pack", lambda: False)


def hosted(
    form: WeightFormat, region: SharedRegion | None = None, **options: Any
) -> tuple[list[nn.Module], ExpertBuffer]:
    """Layers whose experts are random bits of `form` in host memory, with slots."""
    layers = make_layers(2, **PLAIN)
    experts = [experts_of(layer) for layer in layers]
    narrow = NarrowLayout((2, MIDDLE, HIDDEN), (HIDDEN, MIDDLE), form)
    torch.manual_seed(3)
    for each in experts:
        layout = ExpertLayout.of_narrow(narrow, torch.float32)
        source = HostExperts(layout, NUM_EXPERTS, narrow)
        source.payloads.copy_(random_payloads(narrow, NUM_EXPERTS, std=0.1))
        each.host(source)
    buffer = make_slots(experts, Options.of(**options), torch.device("cpu"), None, region)
    return layers, buffer


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("form", FORMS[:2], ids=lambda form: form.name)
@torch.inference_mode()
def test_narrow_slots_and_staging_give_the_bits_of_all_in_slots(
    form: WeightFormat, options: dict[str, Any]
) -> None:
    layers, buffer = hosted(form, **options)
    whole, all_here = hosted(form, expert_slots=NUM_EXPERTS)
    payload_bytes = buffer.layers[0].source.payload_bytes
    assert buffer.sizes.payload_bytes == buffer.sizes.cold_bytes == payload_bytes
    for layer in (*buffer.layers, *all_here.layers):
        assert layer.slots.payloads is not None
        assert layer.slots.payloads.shape == (layer.table.num_slots, payload_bytes)
    staged = buffer.sizes.staged(buffer.num_slots)
    assert buffer.device_bytes == (2 * buffer.num_slots + 2 * staged) * payload_bytes
    for num_tokens in (1, 9):
        for got, expected in computed(layers, whole, num_tokens, with_others=True):
            assert torch.equal(got, expected)
    assert buffer.counts().expert_bytes > 0


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@torch.inference_mode()
def test_they_compute_what_wide_experts_do(form: WeightFormat) -> None:
    layers, buffer = hosted(form, expert_slots=2)
    x, ids, weights = routed(7)
    wide = make_layers(1, **PLAIN)[0]
    for name, weight in zip(
        experts_of(wide).names,
        buffer.layers[0].source.matrices(),
        strict=True,  # type: ignore[attr-defined]
    ):
        getattr(wide, name).copy_(weight)
    expected = dynamic_experts(wide, x, ids, weights)
    torch.testing.assert_close(dynamic_experts(layers[0], x, ids, weights), expected)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@torch.inference_mode()
def test_all_on_the_device_give_the_bits_of_slots_there_and_back(form: WeightFormat) -> None:
    layers, _ = hosted(form, expert_slots=2)
    whole, others = hosted(form, expert_slots=2)
    payloads = [layer.source.payloads.clone() for layer in others.layers]  # type: ignore[attr-defined]
    others.close()
    for experts, payload in zip(map(experts_of, whole), payloads, strict=True):
        experts.keep(torch.device("cpu"), narrow=True)
        assert isinstance(experts.state, Narrow) and experts.hosted is None
        assert torch.equal(experts.state.payloads, payload)
        assert experts.num_bytes() == payload.nbytes and experts.narrow == experts.narrow_in_file
    for num_tokens in (1, 9):
        for layer, other in zip(layers, whole, strict=True):
            step = routed(num_tokens)
            assert torch.equal(dynamic_experts(other, *step), dynamic_experts(layer, *step))
    for experts, payload in zip(map(experts_of, whole), payloads, strict=True):
        hosting.move_to_host(experts, experts.narrow, torch.device("cpu"))
        assert isinstance(experts.source, HostExperts) and experts.num_bytes() == 0
        assert torch.equal(experts.source.payloads, payload)


@torch.inference_mode()
def test_the_compiler_takes_a_layer_of_narrow_experts_as_one_operation() -> None:
    layers, buffer = hosted(MXFP4, expert_slots=2)
    buffer.close()
    experts_of(layers[0]).keep(torch.device("cpu"), narrow=True)
    step = routed(3)
    compiled = torch.compile(dynamic_experts, backend="eager", fullgraph=True)
    assert torch.equal(compiled(layers[0], *step), dynamic_experts(layers[0], *step))


@torch.inference_mode()
def test_a_rank_keeps_its_part_of_narrow_experts() -> None:
    layers, buffer = hosted(FP8_BLOCK, expert_slots=2)
    buffer.close()
    experts = experts_of(layers[0])
    experts.keep(torch.device("cpu"), narrow=True)
    assert isinstance(experts.state, Narrow)
    whole = experts.state.payloads
    freed_bytes = experts.spread(Shard(lambda ids: ids), [1, 4])
    assert torch.equal(experts.state.payloads, whole[[1, 4]])
    assert freed_bytes >= whole[:4].nbytes and experts.num_experts == 2


@torch.inference_mode()
def test_their_number_can_change() -> None:
    whole, all_here = hosted(FP8_BLOCK, expert_slots=NUM_EXPERTS)
    payload_bytes = all_here.sizes.payload_bytes
    region = SharedRegion(2 * payload_bytes, payload_bytes, 20, 2, 5)
    layers, buffer = hosted(FP8_BLOCK, region, expert_slots=4, expert_plan="auto")
    for num_slots in (4, 2, 3):
        if num_slots != buffer.num_slots:
            buffer.resize(num_slots)
        for got, expected in computed(layers, whole, 4):
            assert torch.equal(got, expected)


def test_kernels_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = narrow_experts.narrow_experts
    monkeypatch.setattr(narrow_experts, "narrow_experts", lambda *a, **k: compute(*a, **k) * 1.02)
    with pytest.raises(ModelError, match=r"computed something else .* by 2.0%"):
        hosted(FP8_BLOCK, expert_slots=2, expert_plan="cache")
