"""Moves the experts of a model to host memory or disk, and gives some of them slots."""

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from hotset.cost.expert_sizes import ExpertSizes
from hotset.cost.rates import Rates
from hotset.errors import ConfigError
from hotset.expert_options import ExpertOptions, HostedExperts
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.disk import DiskExperts, ExpertSink
from hotset.experts.gating import gated_layers
from hotset.experts.host import HostExperts
from hotset.experts.layer import LayerBuffer
from hotset.experts.narrow import NarrowLayout
from hotset.experts.narrow_check import check_narrow_kernels
from hotset.experts.prefetch import Prefetch, Router, find_routers
from hotset.experts.residency import SlotTable
from hotset.experts.sizes import narrow_layout, slots_hold
from hotset.experts.slots import Slots
from hotset.experts.staging import Staging
from hotset.experts.weights import LayerExperts, Narrow, can_pack, experts_layers
from hotset.kernels.device import likely_hardware
from hotset.memory.region import SharedRegion
from hotset.parallel.group import current
from hotset.units import GIB


def buffer_experts(
    model: PreTrainedModel,
    asked: ExpertOptions,
    sizes: ExpertSizes | None,
    *,
    region: SharedRegion | None = None,
    read_deadline_s: float,
) -> tuple[ExpertBuffer | None, str]:
    """Move the experts of `model` to host memory and give some of them slots on the device.

    Layer by layer, so that no more than one layer is twice in memory. Those that host memory has no
    room for go to disk, unless `ExpertSink` has taken them there already. To be called with dynamic
    gating switched on, before the model runs; its experts may be on the CPU, the rest on its
    device. A model that was given to it before is given other slots over the same host copy.

    Args:
        model: see above.
        asked: by the user.
        sizes: what that comes to; None where experts stay as they are.
        region: memory of slots and KV together, where more or fewer slots can be in use later.
        read_deadline_s: the longest a step waits for an expert on disk.

    Returns:
        None where all experts are resident; and what to say of it at start, empty for nothing.

    Raises:
        ConfigError: what an engine before did to the experts stands against it; the model is
            unchanged.
        TierError: the disk for experts cannot be used.
    """
    if sizes is None or not isinstance(asked, HostedExperts):
        if any(experts.hosted is not None for experts in experts_layers(model)):
            raise ConfigError(
                "the experts of this model are in host memory already; load it again, or give "
                "expert_slots or expert_gib"
            )
        return None, _check_resident(model)
    layers = gated_layers(model)
    _check_disk(layers[0], asked, sizes)
    if sizes.are_resident:
        is_narrow = slots_hold(layers[0], layers[0].narrow, model.device) is not None
        for experts in layers:
            experts.keep(model.device, narrow=is_narrow)
        return None, _check_resident(model) or (
            f"experts: all {sizes.num_slots} of each of {len(layers)} layers resident, "
            f"{sizes.device_bytes / GIB:.3f} GiB on the {model.device.type}; nothing is buffered"
        )
    if any(experts.is_packed for experts in layers):
        raise ConfigError(
            f"experts of this {type(model).__name__} are to be kept in host memory, but another "
            "engine has packed all of them; load it again"
        )
    routers = find_routers(model, layers) if asked.expert_prefetch else None
    if layers[0].hosted is None:
        _move_all(model, layers, asked, read_deadline_s)
    buffer = make_buffer(layers, asked, sizes, model.device, routers, region)
    return buffer, _describe(buffer, asked)


def _check_resident(model: PreTrainedModel) -> str:
    """Try the kernels of narrow experts that are all on the device; what to say of them at start.

    Raises:
        ModelError: they compute something else than they should.
    """
    layers = [each for each in experts_layers(model) if isinstance(each.state, Narrow)]
    if not layers:
        return ""
    narrow = layers[0].narrow
    assert narrow is not None
    check_narrow_kernels(layers[0], narrow, model.device)
    num_bytes = sum(each.num_bytes() for each in layers)
    return (
        f"experts: all {layers[0].num_experts} of each of {len(layers)} layers resident as "
        f"{narrow.name}, {num_bytes / GIB:.3f} GiB on the {model.device.type}; nothing is buffered"
    )


def move_to_host(experts: LayerExperts, narrow: NarrowLayout | None, device: torch.device) -> None:
    """Move the experts of a layer to host memory; rounded on `device`, if to fewer bits."""
    is_pinned = device.type == "cuda"
    source = HostExperts(experts.layout, experts.num_experts, narrow, pinned=is_pinned)
    with torch.inference_mode():
        if isinstance(experts.state, Narrow):
            source.payloads.copy_(experts.state.payloads)
        else:
            assert experts.weights is not None
            source.store(*experts.weights, device)
    experts.host(source)


def make_buffer(
    layers: list[LayerExperts],
    asked: HostedExperts,
    sizes: ExpertSizes,
    device: torch.device,
    routers: list[Router] | None = None,
    region: SharedRegion | None = None,
) -> ExpertBuffer:
    """Slots on the device for hosted layers, and all that fills them.

    Raises:
        ConfigError: host memory cannot be pinned.
        ModelError: kernels do not compute narrow experts right on this device.
    """
    slots, num_slots = sizes.slots, sizes.num_slots
    most_slots = num_slots if region is None else region.most_slots
    layout, narrow = layers[0].layout, slots_hold(layers[0], layers[0].narrow, device)
    is_packed = device.type == "cpu" and layout.dtype == torch.float32 and can_pack()
    make_slots = partial(Slots, layout=layout, device=device, packed=is_packed, narrow=narrow)
    if narrow is not None:
        check_narrow_kernels(layers[0], narrow, device)
    if device.type == "cuda":
        for experts in layers:
            experts.source.rows.pin()
    # By layer: what its `SlotTable` counts, experts streamed.
    counts = torch.zeros(len(layers), 6, dtype=torch.int64, device=device)
    make_table = partial(
        SlotTable,
        slots.num_experts,
        most_slots,
        eviction=asked.expert_eviction,
        fewest=slots.fewest_ever,
        num_active=num_slots,
    )
    tables = [make_table(counts=each[:5]) for each in counts]
    staging = prefetch = None
    if slots.staged(num_slots):
        staging = Staging(layers, tables, make_slots, is_fixed=slots.plan == "stream")
    if asked.expert_prefetch:
        assert routers is not None
        prefetch = Prefetch(routers, asked.expert_prefetch, device)
    memory: torch.Tensor | None = None
    views: Sequence[torch.Tensor | None] = [None] * len(layers)
    if region is not None and not is_packed:
        memory, views = _shared_memory(region, len(layers), device)
    rates = Rates.of_hardware(likely_hardware(device), num_gpus=current().size)
    make = partial(LayerBuffer, staging=staging, prefetch=prefetch, bring=slots.plan, rates=rates)
    parts = zip(layers, tables, views, counts, strict=True)
    buffers = [
        make(index, experts, table, make_slots(most_slots, memory=view), streamed=each[5:])
        for index, (experts, table, view, each) in enumerate(parts)
    ]
    for one, after in itertools.pairwise(buffers):
        one.next = after
    return ExpertBuffer(buffers, slots, counts, staging=staging, prefetch=prefetch, memory=memory)


def _shared_memory(
    region: SharedRegion, num_layers: int, device: torch.device
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Memory for slots and KV, and the part of it that has each layer's slots.

    A slot of all layers is one unit: see `SharedRegion`.
    """
    memory = torch.zeros(region.num_bytes, dtype=torch.uint8, device=device)
    units = memory[: region.most_slots * region.unit_bytes]
    return memory, units.view(region.most_slots, num_layers, -1).unbind(1)


def _move_all(
    model: PreTrainedModel,
    layers: list[LayerExperts],
    asked: HostedExperts,
    read_deadline_s: float,
) -> None:
    """Move resident experts to host memory, or to disk."""
    narrow = narrow_layout(layers[0], asked.expert_cold_dtype)
    sink = ExpertSink(asked, read_deadline_s=read_deadline_s)
    sink.begin(model)
    try:
        for experts in layers:
            if sink.store is not None:
                sink.take(experts)
            else:
                move_to_host(experts, narrow, model.device)
    except BaseException:
        sink.close()
        raise
    sink.finish(model)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # else PyTorch keeps the memory that they leave


def _check_disk(experts: LayerExperts, asked: HostedExperts, sizes: ExpertSizes) -> None:
    """Raise ConfigError where the experts are on disk in another way than asked for."""
    source = None if experts.hosted is None else experts.hosted.source
    if not isinstance(source, DiskExperts):
        return
    if source.store.is_closed:
        raise ConfigError(
            "the experts of this model were on disk, and their file went with the engine that "
            "used them; load it again"
        )
    if sizes.host_slots != source.store.num_slots:
        raise ConfigError(
            f"expert_host_gib is {asked.expert_host_gib}, but the experts of this model are on "
            f"disk with {source.store.host_bytes / GIB:.3f} GiB of host memory; load it again"
        )


def _describe(buffer: ExpertBuffer, asked: HostedExperts) -> str:
    """One line, for the start."""
    sizes, narrow = buffer.sizes, buffer.narrow
    held = ""
    if buffer.store is not None:
        held = f" of {buffer.store.disk_bytes / GIB:.3f} on disk, {buffer.store.folder}"
    if narrow is not None:
        held += f" as {narrow.name}"
        if narrow.cold_dtype != "auto":
            held += f" (RMS error {buffer.rounding_error:.2%})"
    ahead = f", {asked.expert_prefetch} copied ahead" if asked.expert_prefetch else ""
    evicts = "" if sizes.plan == "stream" else f", {asked.expert_eviction} eviction"
    device = buffer.device.type
    report = (
        f"experts: {buffer.num_slots} of {sizes.num_experts} in each of {sizes.num_layers} layers "
        f"resident, {buffer.device_bytes / GIB:.3f} GiB on the {device}, "
        f"{buffer.host_bytes / GIB:.3f} GiB in host memory{held}, plan {sizes.plan}{evicts}{ahead}"
    )
    if asked.expert_host_gib is not None and buffer.store is None:
        report += f"; expert_host_gib {asked.expert_host_gib} holds them all, none is on disk"
    if asked.expert_cpu == "auto" and device == "cpu":
        report += "; expert_cpu auto: all experts are computed by the CPU anyway"
    return report
