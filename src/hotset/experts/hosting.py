"""Moves the experts of a model to host memory or disk, and gives some of them slots."""

import itertools
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hotset.config import GIB, EngineConfig
from hotset.cost.rates import Rates
from hotset.errors import ConfigError
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.disk import DiskExperts, ExpertSink
from hotset.experts.gating import gated_layers
from hotset.experts.host import ColdSource, HostExperts
from hotset.experts.layer import LayerBuffer
from hotset.experts.narrow import NarrowLayout
from hotset.experts.prefetch import Prefetch, Router, find_routers
from hotset.experts.residency import SlotTable
from hotset.experts.sizes import check_layers, narrow_layout, num_slots_of, sizes_of
from hotset.experts.slots import Slots
from hotset.experts.staging import Staging
from hotset.experts.weights import LayerExperts, can_pack, experts_layers
from hotset.kernels.device import likely_hardware
from hotset.memory.region import SharedRegion


def buffer_experts(
    model: PreTrainedModel,
    config: EngineConfig,
    region: SharedRegion | None = None,
    solved_slots: int | None = None,
) -> tuple[ExpertBuffer | None, str]:
    """Move the experts of `model` to host memory and keep on the device what `config` allows.

    Layer by layer, so that no more than one layer is twice in memory. Where `expert_host_gib` does
    not hold them, they go to disk, unless `ExpertSink` has taken them there already. To be called
    with dynamic gating switched on, before the model runs; its experts may be on the CPU, the rest
    on its device. A model that was given to it before is given other slots over the same host
    copy. With `region` slots share its memory with KV, and more or fewer of them can be in use
    later. `solved_slots` are those of each layer where a split of memory has found them; else they
    are as `config` asks.

    Returns:
        None where `config` asks for no buffering, or its budget holds all experts; and what to say
        of it at start, empty for nothing.

    Raises:
        ConfigError: buffering is asked for and cannot be done, or the budget is too small; the
            model is unchanged.
        TierError: the disk for experts cannot be used.
    """
    if solved_slots is None and not config.buffers_experts:
        if any(experts.hosted is not None for experts in experts_layers(model)):
            raise ConfigError(
                "the experts of this model are in host memory already; load it again, or give "
                "expert_slots or expert_gib"
            )
        return None, ""
    if config.expert_cpu == "on" and model.device.type == "cpu":
        raise ConfigError(
            "expert_cpu is 'on', but the device is the CPU, which computes all experts anyway; "
            "leave it out"
        )
    layers = gated_layers(model)
    check_layers(model, layers, config)
    _check_disk(layers[0], config)
    sizes = sizes_of(layers, config)
    if num_slots_of(config, sizes, solved_slots) == sizes.num_experts:
        for experts in layers:
            experts.keep(model.device)
        all_bytes = sizes.num_layers * sizes.num_experts * sizes.payload_bytes
        return None, (
            f"experts: all {sizes.num_experts} of each of {sizes.num_layers} layers resident, "
            f"{all_bytes / GIB:.3f} GiB on the {model.device.type}; nothing is buffered"
        )
    if any(experts.is_packed for experts in layers):
        raise ConfigError(
            f"experts of this {type(model).__name__} are to be kept in host memory, but another "
            "engine has packed all of them; load it again"
        )
    routers = find_routers(model, layers) if config.expert_prefetch else None
    if layers[0].hosted is None:
        _move_all(model, layers, config)
    _check_with_disk(layers[0], config, region)
    buffer = make_buffer(layers, config, model.device, routers, region, solved_slots)
    report = _describe(buffer, config)
    if config.expert_host_gib is not None and buffer.store is None:
        report += f"; expert_host_gib {config.expert_host_gib} holds them all, none is on disk"
    if config.expert_cpu == "auto" and model.device.type == "cpu":
        report += "; expert_cpu auto: all experts are computed by the CPU anyway"
    return buffer, report


def move_to_host(experts: LayerExperts, narrow: NarrowLayout | None, device: torch.device) -> None:
    """Move the experts of a layer to host memory; rounded on `device`, if to fewer bits."""
    is_pinned = device.type == "cuda"
    source = HostExperts(experts.layout, experts.num_experts, narrow, pinned=is_pinned)
    assert experts.weights is not None
    with torch.inference_mode():
        source.store(*experts.weights, device)
    experts.host(source)


def make_buffer(
    layers: list[LayerExperts],
    config: EngineConfig,
    device: torch.device,
    routers: list[Router] | None = None,
    region: SharedRegion | None = None,
    solved_slots: int | None = None,
) -> ExpertBuffer:
    """Slots on the device for hosted layers, and all that fills them, as `config` has it.

    Raises:
        ConfigError: host memory cannot be pinned.
    """
    sources = [_source_of(experts) for experts in layers]
    first, num_layers = sources[0], len(layers)
    bring = "cache" if isinstance(first, DiskExperts) else config.expert_plan
    sizes = replace(sizes_of(layers, config), plan=bring)
    num_slots = most_slots = num_slots_of(config, sizes, solved_slots)
    if region is not None:
        most_slots = region.most_slots
        sizes = replace(sizes, fewest_ever=region.fewest_slots)
    packed = device.type == "cpu" and first.layout.dtype == torch.float32 and can_pack()
    is_transposed = layers[0].is_transposed
    if device.type == "cuda":
        for source in sources:
            source.rows.pin()
    # By layer: what its `SlotTable` counts, experts streamed.
    counts = torch.zeros(num_layers, 6, dtype=torch.int64, device=device)
    tables = [
        SlotTable(
            sizes.num_experts,
            most_slots,
            eviction=config.expert_eviction,
            counts=each[:5],
            fewest=sizes.fewest_ever,
            num_active=num_slots,
        )
        for each in counts
    ]
    staging = None
    if sizes.staged(num_slots):
        hosts = [source for source in sources if isinstance(source, HostExperts)]
        staging = Staging(
            hosts,
            tables,
            device,
            is_transposed=is_transposed,
            is_fixed=config.expert_plan == "stream",
            packed=packed,
        )
    prefetch = None
    if config.expert_prefetch:
        assert routers is not None
        prefetch = Prefetch(routers, config.expert_prefetch, device)
    memory, views = _shared_memory(region, num_layers, device) if not packed else (None, None)
    rates = Rates.of_hardware(likely_hardware(device))
    buffers = [
        LayerBuffer(
            index,
            experts,
            sources[index],
            tables[index],
            Slots(
                most_slots,
                first.layout,
                device,
                packed=packed,
                is_transposed=is_transposed,
                memory=None if views is None else views[index],
            ),
            staging,
            prefetch,
            bring=bring,
            streamed=counts[index, 5:],
            rates=rates,
        )
        for index, experts in enumerate(layers)
    ]
    for one, after in itertools.pairwise(buffers):
        one.next = after
    return ExpertBuffer(
        layers, buffers, sizes, counts, staging=staging, prefetch=prefetch, memory=memory
    )


def _shared_memory(
    region: SharedRegion | None, num_layers: int, device: torch.device
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
    """Memory for slots and KV, and of each layer the slots' part of it; None where they share none.

    A slot of all layers is one unit: see `SharedRegion`.
    """
    if region is None:
        return None, None
    memory = torch.zeros(region.num_bytes, dtype=torch.uint8, device=device)
    units = memory[: region.most_slots * region.unit_bytes]
    return memory, units.view(region.most_slots, num_layers, -1).unbind(1)


def _source_of(experts: LayerExperts) -> ColdSource:
    assert experts.hosted is not None
    return experts.hosted.source


def _move_all(model: PreTrainedModel, layers: list[LayerExperts], config: EngineConfig) -> None:
    """Move resident experts to host memory, or to disk."""
    narrow = narrow_layout(layers[0], config)
    sink = ExpertSink(config)
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


def _check_disk(experts: LayerExperts, config: EngineConfig) -> None:
    """Raise ConfigError where the experts are on disk in another way than asked for."""
    source = None if experts.hosted is None else experts.hosted.source
    if not isinstance(source, DiskExperts):
        return
    if source.store.is_closed:
        raise ConfigError(
            "the experts of this model were on disk, and their file went with the engine that "
            "used them; load it again"
        )
    asked = config.expert_host_gib
    if asked is None or int(asked * GIB) // source.layout.payload_bytes != source.store.num_slots:
        raise ConfigError(
            f"expert_host_gib is {asked}, but the experts of this model are on disk with "
            f"{source.store.host_bytes / GIB:.3f} GiB of host memory; load it again"
        )


def _check_with_disk(
    experts: LayerExperts, config: EngineConfig, region: SharedRegion | None
) -> None:
    """Raise ConfigError for what experts on disk do not go with, where they are."""
    if not isinstance(_source_of(experts), DiskExperts):
        return
    given = {name: getattr(config, name) for name in ("expert_cpu", "expert_prefetch")}
    said = [f"{name} is {value!r}" for name, value in given.items() if value not in ("off", 0)]
    if region is not None:
        said.append("move_split is given")
    if said:
        raise ConfigError(
            f"{said[0]}, but expert_host_gib {config.expert_host_gib} leaves experts on disk, with "
            "which it does not work; leave one of them out"
        )


def _describe(buffer: ExpertBuffer, config: EngineConfig) -> str:
    """One line, for the start."""
    sizes, narrow = buffer.sizes, buffer.narrow
    held = "" if narrow is None else f" as {narrow.dtype} (RMS error {buffer.rounding_error:.2%})"
    if buffer.store is not None:
        held = f" of {buffer.store.disk_bytes / GIB:.3f} on disk, {buffer.store.folder}"
    ahead = f", {config.expert_prefetch} copied ahead" if config.expert_prefetch else ""
    evicts = "" if sizes.plan == "stream" else f", {config.expert_eviction} eviction"
    device = buffer.device.type
    return (
        f"experts: {buffer.num_slots} of {sizes.num_experts} in each of {sizes.num_layers} layers "
        f"resident, {buffer.device_bytes / GIB:.3f} GiB on the {device}, "
        f"{buffer.host_bytes / GIB:.3f} GiB in host memory{held}, plan {sizes.plan}{evicts}{ahead}"
    )
