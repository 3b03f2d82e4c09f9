"""Experts of which some are on the device and all in host memory, or on disk below it.

Two plans, chosen for each step by its number of tokens. *cache*: the experts that a step needs and
that have no slot are copied into one. *stream*: all experts of a layer that have no slot come
through one of two staging buffers while the layer before computes, and the slots keep what they
hold. Output does not depend on the plan, on what is resident or on the evictions. Source of expert
buffering: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from hotset.config import GIB, EngineConfig
from hotset.cost.rates import Rates
from hotset.cost.slot_bytes import SlotBytes, count_slots
from hotset.errors import ConfigError
from hotset.experts.cpu import ColdExperts, ColdLayer, device_seconds
from hotset.experts.disk import ExpertSink, layout_of
from hotset.experts.gating import (
    IMPLEMENTATION,
    Experts,
    experts_layers,
    up_name,
    use_dynamic_gating,
)
from hotset.experts.host import HostExperts, HostRows
from hotset.experts.layer import LayerBuffer
from hotset.experts.narrow import NarrowLayout, relative_rms
from hotset.experts.prefetch import Prefetch, Router, find_routers
from hotset.experts.residency import SlotTable
from hotset.experts.slots import Staging
from hotset.experts.store import DiskExperts, ExpertStore, StoreCounts
from hotset.kernels.device import likely_hardware
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.region import SharedRegion


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What the buffers of a model did so far, over all layers.

    Attributes:
        hits: experts that a layer needed in a step of the plan *cache*, and that had a slot.
        misses: those that had none.
        moved_bytes: from host memory to the device, by both plans.
        predicted: experts that the router of a layer chose before the layer was there.
        predicted_right: of these, those that it then needed.
        copied_ahead: of those that were predicted and had no slot, those that were given one.
        computed: by the CPU, which are neither hits nor misses.
        disk: what those on disk did; None where there are none.
    """

    hits: int = 0
    misses: int = 0
    moved_bytes: int = 0
    predicted: int = 0
    predicted_right: int = 0
    copied_ahead: int = 0
    computed: int = 0
    disk: StoreCounts | None = None


class ExpertBuffer:
    """The buffers of all layers of a model.

    Attributes:
        sizes: of slots.
        memory: `[region.num_bytes]` uint8 on the device, which slots share with KV; None where they
            have their own. Packed slots always do: there only numbers move.
        host_bytes: of the only copy in host memory; or, with experts on disk, of all that is there.
        store: of experts on disk; None where all are in host memory.
        rounding_error: relative root mean square error of the weights of all experts, where host
            memory has them in fewer bits; else 0.
        description: one line, for the start.
    """

    def __init__(
        self,
        layers: list[Experts],
        config: EngineConfig,
        device: torch.device,
        routers: list[Router] | None = None,
        region: SharedRegion | None = None,
    ) -> None:
        hosts = [layer.expert_host for layer in layers]
        num_experts, layout = layers[0].num_experts, hosts[0].layout
        stores = [host.store for host in hosts if isinstance(host, DiskExperts)]
        self.store: ExpertStore | None = stores[0] if stores else None
        plan = config.expert_plan if self.store is None else "cache"
        sizes = replace(_sizes(layers, config), plan=plan)
        num_slots = most_slots = _num_slots(config, sizes)
        if region is not None:
            most_slots = region.most_slots
            sizes = replace(sizes, fewest_ever=region.fewest_slots)
        self.sizes = sizes
        packed = device.type == "cpu" and layout.dtype == torch.float32 and _can_pack()
        self._payload_bytes = hosts[0].payload_bytes
        # By layer: what its `SlotTable` counts, experts streamed.
        self._counts = torch.zeros(len(layers), 6, dtype=torch.int64, device=device)
        if device.type == "cuda":
            for rows in self._rows(hosts):
                rows.pin()
        self._hosts, self._modules, self._plan = hosts, layers, plan
        self._cold: ColdExperts | None = None
        tables = [
            SlotTable(
                num_experts,
                most_slots,
                eviction=config.expert_eviction,
                counts=counts[:5],
                fewest=sizes.fewest_ever,
                num_active=num_slots,
            )
            for counts in self._counts
        ]
        self._staging = None
        if sizes.staged(num_slots):
            transposed = [bool(layer.is_transposed) for layer in layers]
            is_fixed = config.expert_plan == "stream"
            self._staging = Staging(
                hosts, tables, transposed, device, is_fixed=is_fixed, packed=packed
            )
        self._prefetch = None
        if config.expert_prefetch:
            assert routers is not None
            self._prefetch = Prefetch(routers, config.expert_prefetch, device)
        self.memory: torch.Tensor | None = None
        slots: list[torch.Tensor | None] = [None] * len(layers)
        if region is not None and not packed:
            self.memory = torch.zeros(region.num_bytes, dtype=torch.uint8, device=device)
            units = self.memory[: most_slots * region.unit_bytes]
            slots[:] = units.view(most_slots, len(layers), -1).unbind(1)
        self.layers: list[LayerBuffer] = []
        rates = Rates.of_hardware(likely_hardware(device))
        for index, layer in enumerate(layers):
            counts = self._counts[index]
            layer.expert_buffer = LayerBuffer(
                index,
                hosts[index],
                tables[index],
                self._staging,
                self._prefetch,
                plan=plan,
                streamed=counts[5:],
                rates=rates,
                packed=packed,
                is_transposed=bool(layer.is_transposed),
                memory=slots[index],
            )
            self.layers.append(layer.expert_buffer)
        for one, after in itertools.pairwise(self.layers):
            one.next = after
        self.host_bytes = sum(rows.num_bytes for rows in self._rows(hosts))
        in_memory = [host for host in hosts if isinstance(host, HostExperts)]
        self.rounding_error = relative_rms(host.rounding for host in in_memory)
        narrow = hosts[0].narrow
        held = "" if narrow is None else f" as {narrow.dtype} (RMS error {self.rounding_error:.2%})"
        if self.store is not None:
            held = f" of {self.store.disk_bytes / GIB:.3f} on disk, {self.store.folder}"
        ahead = f", {config.expert_prefetch} copied ahead" if config.expert_prefetch else ""
        evicts = "" if plan == "stream" else f", {config.expert_eviction} eviction"
        self.description = (
            f"experts: {num_slots} of {num_experts} in each of {len(layers)} layers resident, "
            f"{self.device_bytes / GIB:.3f} GiB on the {device.type}, "
            f"{self.host_bytes / GIB:.3f} GiB in host memory{held}, plan {plan}{evicts}{ahead}"
        )

    def counts(self) -> ExpertCounts:
        """What the buffers did so far; waits for the device."""
        hits, misses, predicted, right, ahead, streamed = self._counts.sum(0).tolist()
        moved = (misses + ahead + streamed) * self._payload_bytes
        computed = self._cold.num_computed if self._cold is not None else 0
        disk = self.store.counts() if self.store is not None else None
        return ExpertCounts(hits, misses, moved, predicted, right, ahead, computed, disk)

    @property
    def num_slots(self) -> int:
        """Slots in use in each layer."""
        return self.layers[0].table.num_active

    @property
    def device_bytes(self) -> int:
        """Of slots in use and staging buffers."""
        return self.sizes(self.num_slots)

    @torch.inference_mode()
    def resize(self, num_slots: int) -> None:
        """Have so many slots of each layer in use: fewer than now, or one more.

        To be called between two steps, and it does not wait: memory of slots that are given up is
        free for what is submitted later.
        """
        self.join()  # what a step that failed may have left behind
        for layer in self.layers:
            layer.resize(num_slots)

    def reset_counts(self) -> None:
        """Count from zero."""
        self._counts.zero_()
        if self._cold is not None:
            self._cold.num_computed = 0
        if self.store is not None:
            self.store.reset_counts()

    def join(self) -> None:
        """Have what is computed from here on wait for the copies started so far."""
        if self._staging is not None:
            self._staging.join()
        if self._prefetch is not None:
            self._prefetch.join()

    def compute_cold_on_cpu(self, mode: str, *, threads: int | None = None) -> str:
        """Have the CPU compute experts that are not on the GPU, in steps of few tokens.

        To be called when the model has run. Steps are recorded before, or within
        `while_recording`.

        Args:
            mode: see `ColdExperts`.
            threads: of the CPU, with the one that launches; None is one for each CPU.

        Returns:
            What to say of it at start.
        """
        device = self._counts.device
        first, host = self.layers[0], self._hosts[0]
        assert isinstance(host, HostExperts)
        hidden_size = host.layout.up[0 if self._modules[0].is_transposed else 1]
        cold = ColdExperts(
            hidden_size,
            first.top_k,
            host.layout.dtype,
            num_experts=first.table.num_experts,
            num_slots=first.table.num_slots,
            is_pinned=device.type == "cuda",
            mode=mode,
            num_threads=None if threads is None else max(1, threads - 1),
        )
        self.attach_cold(cold)
        assert first.cold is not None
        at = torch.empty_like(host.payloads[0], device=device)  # in few bits, if those are

        def copy(count: int) -> None:
            for payload in host.payloads[:count]:
                at.copy_(payload, non_blocking=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        cold.measure(self._modules[0], host, first.cold.biases, copy, device_seconds(device))
        return cold.describe()

    def attach_cold(self, cold: ColdExperts) -> None:
        """Let `cold` take part in the steps of all layers."""
        self._cold = cold
        for buffer, layer in zip(self.layers, self._modules, strict=True):
            assert isinstance(buffer.host, HostExperts)
            can_copy = self._plan != "stream"  # which keeps what is in slots
            buffer.cold = ColdLayer(cold, buffer.host, buffer.table, layer, can_copy=can_copy)

    @contextmanager
    def while_recording(self) -> Iterator[None]:
        """Within it steps may be recorded beside those of requests.

        The CPU computes no experts, as a recorded step decides without the host, and what is tried
        counts as nothing.
        """
        counted = self._counts.clone()
        if self._cold is not None:
            self._cold.is_paused = True
        try:
            yield
        finally:
            self._counts.copy_(counted)
            if self._cold is not None:
                self._cold.is_paused = False

    def launches(self, num_tokens: int) -> bool:
        """Whether the host takes part in steps of so many tokens, so that none is replayed."""
        return self._cold is not None and self._cold.takes(num_tokens)

    @property
    def can_be_recorded(self) -> bool:
        """Whether the device decides alone, so that a CUDA graph can hold a step."""
        return self.store is None

    def take_faults(self) -> Counter[str]:
        """What went wrong on disk since the last call, by kind."""
        if self.store is None:
            return Counter()
        faults = Counter(self.store.faults)
        self.store.faults.clear()
        return faults

    def close(self, *, with_disk: bool = False) -> None:
        """Unpin the host copy and leave the layers. No step may be under way, and none may follow.

        Args:
            with_disk: remove the file of experts on disk; the model can never run again then.
        """
        if self._counts.device.type == "cuda":
            torch.cuda.synchronize(self._counts.device)
        for rows in self._rows(self._hosts):
            rows.unpin()
        for module, buffer in zip(self._modules, self.layers, strict=True):
            if module.expert_buffer is buffer:  # another engine may have replaced it
                module.expert_buffer = None  # nor does it keep memory that KV shares
        if self._cold is not None:
            self._cold.close()
        if with_disk and self.store is not None:
            self.store.close()

    def _rows(self, hosts: list[HostExperts | DiskExperts]) -> list[HostRows]:
        """The host memory of all layers."""
        if self.store is not None:
            return [self.store.rows]
        return [host.rows for host in hosts if isinstance(host, HostExperts)]


def buffer_experts(
    model: PreTrainedModel, config: EngineConfig, region: SharedRegion | None = None
) -> tuple[ExpertBuffer | None, str]:
    """Move the experts of `model` to host memory and keep on the device what `config` allows.

    Layer by layer, so that no more than one layer is twice in memory. Where `expert_host_gib` does
    not hold them, they go to disk, unless `ExpertSink` has taken them there already. To be called
    before the model runs; its experts may be on the CPU, the rest on its device. A model that was
    given to it before is given other slots over the same host copy. With `region` slots share its
    memory with KV, and more or fewer of them can be in use later.

    Returns:
        None where `config` asks for no buffering, or its budget holds all experts; and what to say
        of it at start, empty for nothing.

    Raises:
        ConfigError: buffering is asked for and cannot be done, or the budget is too small; the
            model is unchanged.
        TierError: the disk for experts cannot be used.
    """
    if not config.buffers_experts:
        if any(hasattr(layer, "expert_host") for layer in experts_layers(model)):
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
    layers = _bufferable(model, config)
    _check_disk(layers, config)
    sizes = _sizes(layers, config)
    num_slots = _num_slots(config, sizes)
    _check_effects(config, num_slots, sizes.num_experts)
    if num_slots == sizes.num_experts:
        _keep_all(layers, model.device)
        all_bytes = sizes.num_layers * sizes.num_experts * sizes.payload_bytes
        return None, (
            f"experts: all {sizes.num_experts} of each of {sizes.num_layers} layers resident, "
            f"{all_bytes / GIB:.3f} GiB on the {model.device.type}; nothing is buffered"
        )
    if any(_is_packed(layer) for layer in layers):
        raise ConfigError(
            f"experts of this {type(model).__name__} are to be kept in host memory, but another "
            "engine has packed all of them; load it again"
        )
    narrow = _narrow_layout(layers[0], config)
    routers = find_routers(model, layers) if config.expert_prefetch else None
    _move_all(model, layers, narrow, config)
    if isinstance(layers[0].expert_host, DiskExperts):
        for name, default in (("expert_cpu", "off"), ("expert_prefetch", 0)):
            if (value := getattr(config, name)) != default:
                raise ConfigError(
                    f"{name} is {value!r}, but expert_host_gib {config.expert_host_gib} leaves "
                    "experts on disk, with which it does not work; leave one of them out"
                )
        if region is not None:
            raise ConfigError(
                f"move_split is given, but expert_host_gib {config.expert_host_gib} leaves experts "
                "on disk, with which it does not work; leave one of them out"
            )
    buffer = ExpertBuffer(layers, config, model.device, routers, region)
    report = buffer.description
    if config.expert_host_gib is not None and buffer.store is None:
        report += f"; expert_host_gib {config.expert_host_gib} holds them all, none is on disk"
    if config.expert_cpu == "auto" and model.device.type == "cpu":
        report += "; expert_cpu auto: all experts are computed by the CPU anyway"
    return buffer, report


def _check_disk(layers: list[Experts], config: EngineConfig) -> None:
    """Raise ConfigError where the experts are on disk in another way than asked for."""
    host = getattr(layers[0], "expert_host", None)
    if not isinstance(host, DiskExperts):
        return
    if host.store.is_closed:
        raise ConfigError(
            "the experts of this model were on disk, and their file went with the engine that "
            "used them; load it again"
        )
    asked = config.expert_host_gib
    if asked is None or int(asked * GIB) // host.layout.payload_bytes != host.store.num_slots:
        raise ConfigError(
            f"expert_host_gib is {asked}, but the experts of this model are on disk with "
            f"{host.store.host_bytes / GIB:.3f} GiB of host memory; load it again"
        )


def _move_all(
    model: PreTrainedModel,
    layers: list[Experts],
    narrow: NarrowLayout | None,
    config: EngineConfig,
) -> None:
    """Move to host memory, or to disk, what is not there yet."""
    hosts = [layer.expert_host for layer in layers if hasattr(layer, "expert_host")]
    if hosts:
        return
    sink = ExpertSink(config)
    sink.begin(model)
    try:
        for layer in layers:
            if sink.store is not None:
                sink.take(layer)
            else:
                layer.expert_host = _move_to_host(layer, narrow, model.device)
    except BaseException:
        sink.close()
        raise
    sink.finish(model)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what they leave is nobody's, as far as others can see


def check_buffering(model: PreTrainedModel, config: EngineConfig) -> None:
    """Refuse what `buffer_experts` would for the model's layers; `model` may be on `meta`.

    Raises:
        ConfigError: buffering cannot be done, or the budget is too small.
    """
    sizes = _sizes(_bufferable(model, config), config)
    _check_effects(config, _num_slots(config, sizes), sizes.num_experts)


def slot_bytes_of(model: PreTrainedModel, config: EngineConfig) -> SlotBytes | None:
    """What slots of a model's experts take; None where its experts cannot be buffered.

    Raises:
        ConfigError: they are in host memory in other bits than `config` asks for.
    """
    if use_dynamic_gating(model) == 0:
        return None
    layers = experts_layers(model)
    if len({_size_of(layer) for layer in layers}) > 1:
        return None
    return _sizes(layers, config)


def experts_bytes(model: PreTrainedModel, device: torch.device | None = None) -> int:
    """What the weights of experts take, packed ones too, on `device`, None for anywhere.

    Experts that were moved to slots and a host copy are no weights any more.
    """
    total = 0
    for layer in experts_layers(model):
        for name in (up_name(layer), "down_proj"):
            weight = getattr(layer, name)
            if weight is not None and device in (None, weight.device):
                total += weight.nbytes
            total += sum(packed.num_bytes for packed in getattr(layer, f"packed_{name}", ()))
    return total


def _bufferable(model: PreTrainedModel, config: EngineConfig) -> list[Experts]:
    """The layers with experts, all alike, or ConfigError."""
    asked = "expert_slots" if config.expert_slots is not None else "expert_gib"
    given = f"{asked} is {getattr(config, asked)}"
    name = type(model).__name__
    if use_dynamic_gating(model) == 0:
        raise ConfigError(
            f"{given}, but {name} has no experts that can be kept in host memory: it is dense, or "
            f"computes its experts in its own way; leave {asked} out"
        )
    layers = [
        layer
        for layer in experts_layers(model)
        if layer.config._experts_implementation == IMPLEMENTATION
    ]
    kinds = {_size_of(layer) for layer in layers}
    if len(kinds) > 1:
        raise ConfigError(
            f"{given}, but the layers of {name} have experts of {len(kinds)} sizes, which are not "
            f"supported; leave {asked} out"
        )
    return layers


def _num_slots(config: EngineConfig, sizes: SlotBytes) -> int:
    """Experts of a layer that stay on the device, or ConfigError."""
    if config.expert_slots is not None:
        if config.expert_slots > sizes.num_experts:
            raise ConfigError(
                f"expert_slots is {config.expert_slots}, but a layer has {sizes.num_experts} "
                "experts; give so many or fewer"
            )
        return config.expert_slots
    assert config.expert_gib is not None
    num_slots = count_slots(int(config.expert_gib * GIB), sizes.num_experts, sizes)
    if num_slots is None:
        least = sizes(sizes.fewest)
        raise ConfigError(
            f"expert_gib {config.expert_gib} holds too little: the plan {sizes.plan} needs "
            f"{-(-least * 1_000_000 // GIB) / 1_000_000} or more for the experts of this model"
        )
    return num_slots


def _check_effects(config: EngineConfig, num_slots: int, num_experts: int) -> None:
    """Raise ConfigError for an option that does nothing, or cannot, with so many slots."""
    for name, default in (
        ("expert_cold_dtype", "auto"),
        ("expert_prefetch", 0),
        ("expert_host_gib", None),
        ("expert_cpu", "off"),
    ):
        value = getattr(config, name)
        if value != default and num_slots == num_experts:
            raise ConfigError(
                f"{name} is {value}, which does nothing while all experts are on the device, as "
                "they are here; leave it out, or give them less memory"
            )
    if config.expert_prefetch > num_slots:
        raise ConfigError(
            f"expert_prefetch is {config.expert_prefetch}, but a layer keeps {num_slots} experts; "
            "expected so many or fewer"
        )


def _is_packed(layer: Experts) -> bool:
    """Whether an engine on the CPU keeps all experts of the layer, in a form of its own."""
    return hasattr(layer, "packed_down_proj")


def _size_of(layer: Experts) -> tuple[int, int]:
    """Experts of a layer, and bytes from one to the next."""
    num_experts: int = layer.num_experts
    if not _is_packed(layer):
        return num_experts, layout_of(layer).payload_bytes
    names = (up_name(layer), "down_proj")
    return num_experts, slot_bytes_for(
        sum(getattr(layer, f"packed_{name}")[0].num_bytes for name in names)
    )


def _narrow_layout(layer: Experts, config: EngineConfig) -> NarrowLayout | None:
    """How host memory is to have experts, or ConfigError if it has them otherwise."""
    asked = config.expert_cold_dtype
    layout = layout_of(layer)
    narrow = None if asked == "auto" else NarrowLayout(layout.up, layout.down, asked)
    if hasattr(layer, "expert_host"):
        stored: NarrowLayout | None = layer.expert_host.narrow
        has = "auto" if stored is None else stored.dtype
        if has != asked:
            raise ConfigError(
                f"expert_cold_dtype is {asked}, but the experts of this model are in host memory "
                f"as {has} already; load it again"
            )
    return narrow


def _sizes(layers: list[Experts], config: EngineConfig) -> SlotBytes:
    num_experts, payload_bytes = _size_of(layers[0])
    is_packed = _is_packed(layers[0])
    narrow = None if is_packed else _narrow_layout(layers[0], config)
    narrow_bytes = None if narrow is None else narrow.payload_bytes
    return SlotBytes(config.expert_plan, len(layers), num_experts, payload_bytes, narrow_bytes)


def _move_to_host(layer: Experts, narrow: NarrowLayout | None, device: torch.device) -> HostExperts:
    """The experts of a layer in host memory; rounded on `device`, if to fewer bits."""
    is_pinned = device.type == "cuda"
    host = HostExperts(layout_of(layer), layer.num_experts, narrow, pinned=is_pinned)
    up = up_name(layer)
    with torch.inference_mode():
        host.store(getattr(layer, up), layer.down_proj, device)
    setattr(layer, up, None)
    layer.down_proj = None
    return host


def _keep_all(layers: list[Experts], device: torch.device) -> None:
    """All experts as weights on the device, from wherever they are."""
    for layer in layers:
        host: HostExperts | None = getattr(layer, "expert_host", None)
        for name in (up_name(layer), "down_proj"):
            weight = getattr(layer, name)
            if host is None and (weight is None or weight.device == device):
                continue  # where it belongs, packed or not
            if host is not None:
                weight = host.matrices()[name == "down_proj"].clone()
            parameter = nn.Parameter(weight.to(device), requires_grad=False)
            setattr(layer, name, parameter)
        if host is not None:
            host.rows.unpin()
            layer.expert_buffer = None
            del layer.expert_host


def _can_pack() -> bool:
    return bool(torch.backends.mkldnn.is_available())
