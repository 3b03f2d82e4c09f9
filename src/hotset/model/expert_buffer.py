"""Experts of which some are on the device and all in host memory.

Two plans, chosen for each step by its number of tokens. *cache*: the experts that a step needs and
that have no slot are copied into one. *stream*: the first experts stay, and all others of a layer
come through one of two staging buffers while the layer before computes. Output does not depend on
the plan, on what is resident or on the evictions. Source of expert buffering: Huang et al.,
"Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from hotset.config import GIB, EngineConfig
from hotset.errors import ConfigError
from hotset.memory.expert_cache import (
    ExpertLayout,
    HostExperts,
    SlotBytes,
    SlotTable,
    count_slots,
)
from hotset.model.cpu_linear import PackedLinear
from hotset.model.experts import (
    IMPLEMENTATION,
    Experts,
    experts_layers,
    has_grouped_kernel,
    pack_matrix,
    up_name,
    use_dynamic_gating,
)


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What the buffers of a model did so far, over all layers.

    Attributes:
        hits: experts that a layer needed in a step of the plan *cache*, and that had a slot.
        misses: those that had none.
        moved_bytes: from host memory to the device, by both plans.
    """

    hits: int = 0
    misses: int = 0
    moved_bytes: int = 0


class Slots:
    """Places for experts of one layer on the device.

    On the CPU float32 experts are packed as they come, as `pack_experts` does with those that stay:
    the same values come out of the same products.

    Attributes:
        payloads: `[N, payload_bytes]` uint8; None where they are packed.
        up: `[N, *layout.up]` view of it; down: likewise.
    """

    def __init__(
        self, num_slots: int, layout: ExpertLayout, device: torch.device, *, packed: bool
    ) -> None:
        self._packed: list[tuple[PackedLinear, PackedLinear] | None] = []
        self.payloads: torch.Tensor | None = None
        if packed:
            self._packed = [None] * num_slots
        else:
            self.payloads = torch.zeros(
                num_slots, layout.payload_bytes, dtype=torch.uint8, device=device
            )
            self.up, self.down = layout.views(self.payloads)

    def put(self, host: HostExperts, expert: int, slot: int, *, is_transposed: bool) -> None:
        """Copy one expert; where it is to be packed, pack it."""
        if self.payloads is not None:
            self.payloads[slot].copy_(host.payloads[expert], non_blocking=True)
            return
        self._packed[slot] = None  # its memory is free before the other's is taken
        up, down = host.up[expert], host.down[expert]
        if is_transposed:
            up, down = up.t(), down.t()
        self._packed[slot] = (pack_matrix(up), pack_matrix(down))

    def product(self, which: int, slot: int, rows: torch.Tensor, is_transposed: bool) -> Any:
        """`[R, in]` to `[R, out]` by the up (0) or down (1) product of one expert."""
        if self.payloads is None:
            packed = self._packed[slot]
            assert packed is not None, "an expert is used that is not there"
            return packed[which](rows)
        weight = (self.up, self.down)[which][slot]
        return functional.linear(rows, weight.t() if is_transposed else weight)


class Staging:
    """Two staging buffers: while a layer reads one, the next layer's experts go to the other.

    On a GPU the copy engine fills them on a stream of its own, which forks from the stream that
    computes and joins it again, so that a CUDA graph can record both.

    Args:
        hosts: of each layer, in the order in which a step runs them.
        first: the first expert to stage; those before it have slots.
        transposed: whether weights are, by layer.
    """

    def __init__(
        self,
        hosts: list[HostExperts],
        first: int,
        transposed: list[bool],
        device: torch.device,
        *,
        packed: bool,
    ) -> None:
        self._hosts, self._first, self._transposed = hosts, first, transposed
        self._num_staged = len(hosts[0].payloads) - first
        self._buffers = [
            Slots(self._num_staged, hosts[0].layout, device, packed=packed) for _ in range(2)
        ]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: int | None = None  # the layer that is on its way
        self._is_joined = False

    def take(self, layer: int) -> Slots:
        """The buffer with the experts of `layer`; starts to fill the other for the next one."""
        if self._ahead != layer:
            self._start(layer)
        self.join()
        self._ahead = None
        if layer + 1 < len(self._hosts):
            self._start(layer + 1)
        return self._buffers[layer % 2]

    def join(self) -> None:
        """Have what is computed from here on wait for the copies started so far.

        To be called before the end of a recording, too.
        """
        if self._ahead is not None and self._stream is not None and not self._is_joined:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_joined = True

    def _start(self, layer: int) -> None:
        buffer, host = self._buffers[layer % 2], self._hosts[layer]
        self._ahead, self._is_joined = layer, False
        if self._stream is None:
            for slot in range(self._num_staged):
                buffer.put(host, self._first + slot, slot, is_transposed=self._transposed[layer])
            return
        assert buffer.payloads is not None
        # The layer that read this buffer last was submitted before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            buffer.payloads.copy_(host.payloads[self._first :], non_blocking=True)


class LayerBuffer:
    """The experts of one layer, for `dynamic_experts` to call.

    Args:
        staging: None where the plan is *cache* only.
        plan: `cache`, `stream` or `auto`.
        streamed: `[1]` int64 on the device, to be added to: times the layer was streamed.
    """

    def __init__(
        self,
        index: int,
        host: HostExperts,
        table: SlotTable,
        staging: Staging | None,
        *,
        plan: str,
        streamed: torch.Tensor,
        packed: bool,
        is_transposed: bool,
    ) -> None:
        self.host, self.table = host, table
        self._index, self._staging, self._plan = index, staging, plan
        self._streamed = streamed
        self._is_transposed = is_transposed
        self.slots = Slots(table.num_slots, host.layout, streamed.device, packed=packed)
        for expert in range(table.num_fixed):
            self.slots.put(host, expert, expert, is_transposed=is_transposed)
        up = self.slots.up if not packed else host.up
        self._is_grouped = has_grouped_kernel(up)

    def streams(self, num_tokens: int, top_k: int) -> bool:
        """Whether a step of so many tokens streams: it needs more experts than there are slots.

        Expected, if tokens choose among the E experts alike: E * (1 - (1 - top_k / E) ** tokens).
        """
        if self._plan != "auto":
            return self._plan == "stream"
        num_experts = self.table.num_experts
        expected = num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** num_tokens)
        return expected > self.table.num_slots

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        layer: Experts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `dynamic_experts`, with the same result."""
        num_tokens, top_k = top_k_index.shape
        ids = top_k_index.reshape(-1)
        streams = self.streams(num_tokens, top_k)
        if streams:
            self._streamed += 1
        compute = self._grouped if self._is_grouped else self._in_turn
        rows = compute(layer, hidden_states, ids, top_k, streams)  # [T * K, H]
        if getattr(layer, "has_post_expert_norm", False):
            rows = layer.post_expert_norm(rows)
        if getattr(layer, "_is_expert_parallel", True):
            rows = rows.masked_fill((ids >= self.table.num_experts).unsqueeze(-1), 0)
        weighted = rows.view(num_tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
        summed: torch.Tensor = weighted.sum(1)
        return summed.to(hidden_states.dtype)

    def _in_turn(
        self, layer: Experts, hidden: torch.Tensor, ids: torch.Tensor, top_k: int, streams: bool
    ) -> torch.Tensor:
        """`[T * K, H]`, one expert after another; the host reads what is needed."""
        sorted_ids, order = torch.sort(ids, stable=True)
        experts = torch.arange(self.table.num_experts, device=ids.device, dtype=ids.dtype)
        ends = torch.searchsorted(sorted_ids, experts, right=True).tolist()
        bounds = dict(enumerate(zip([0, *ends], ends, strict=False)))
        needed = [expert for expert, (start, end) in bounds.items() if start < end]
        rows = hidden[order // top_k]
        out = torch.zeros_like(rows)
        if streams:
            self._run(layer, rows, out, bounds, self._staged(needed))
        else:
            which = self.table.begin(ids)
            last = self.table.num_passes(len(ids))
            passes = which.tolist()
            for number in range(last):
                wanted = [expert for expert in needed if passes[expert] == number]
                if not wanted:
                    break
                self._copy(*self.table.load(which == number))
                slots = self.table.slots().tolist()
                self._run(layer, rows, out, bounds, {e: (self.slots, slots[e]) for e in wanted})
        back = torch.empty_like(out)
        back[order] = out
        return back

    def _staged(self, needed: list[int]) -> dict[int, tuple[Slots, int]]:
        assert self._staging is not None
        staged, first = self._staging.take(self._index), self.table.num_fixed
        return {e: (self.slots, e) if e < first else (staged, e - first) for e in needed}

    def _run(
        self,
        layer: Experts,
        rows: torch.Tensor,
        out: torch.Tensor,
        bounds: dict[int, tuple[int, int]],
        places: dict[int, tuple[Slots, int]],
    ) -> None:
        """Compute the rows of some experts, `bounds` by expert, into the same rows of `out`."""

        def product(which: int, name: str, source: torch.Tensor, target: Any) -> torch.Tensor:
            for expert, (slots, slot) in places.items():
                start, end = bounds[expert]
                piece = slots.product(which, slot, source[start:end], self._is_transposed)
                if layer.has_bias:
                    piece += getattr(layer, f"{name}_bias")[expert]
                if target is None:
                    target = piece.new_zeros(len(source), piece.shape[1])
                target[start:end] = piece
            assert target is not None
            result: torch.Tensor = target
            return result

        if places:
            # All rows, in their places: vector instructions round as they do with all experts.
            middle = product(0, up_name(layer), rows, None)
            middle = layer._apply_gate(middle) if layer.has_gate else layer.act_fn(middle)
            product(1, "down_proj", middle, out)

    def _grouped(
        self, layer: Experts, hidden: torch.Tensor, ids: torch.Tensor, top_k: int, streams: bool
    ) -> torch.Tensor:
        """`[T * K, H]` by grouped products, in passes of fixed shape; nothing is asked of the host.

        Rows are sorted by pass, then slot. A pass computes all rows, beginning with its own: what
        comes after those belongs to no group and is not computed.
        """
        num_rows = len(ids)
        places = torch.arange(num_rows, device=ids.device)
        # One row more: those that are not a pass's own go there.
        out = hidden.new_zeros(num_rows + 1, hidden.shape[1])
        sizes: list[int]
        if streams:
            first, num_experts = self.table.num_fixed, self.table.num_experts
            keys, sizes = ids, [first, num_experts - first]
            copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        else:
            keys, copies = self._plan_passes(ids)
            sizes = [self.table.num_slots] * len(copies)
        sorted_keys, order = torch.sort(keys, stable=True)
        groups = torch.arange(sum(sizes), device=ids.device, dtype=keys.dtype)
        ends = torch.searchsorted(sorted_keys, groups, right=True, out_int32=True)
        done = 0
        for number, size in enumerate(sizes):
            slots = self.slots
            if streams and number == 1:
                assert self._staging is not None
                slots = self._staging.take(self._index)
            if size == 0:
                continue
            if copies:
                self._copy(*copies[number])
            start = ends[done - 1] if done else None
            offsets = ends[done : done + size] - (0 if start is None else start)
            source = order if start is None else order[(places + start) % num_rows]
            rows = hidden[source // top_k]
            rows = self._product(layer, up_name(layer), rows, slots.up[:size], ids[source], offsets)
            rows = layer._apply_gate(rows) if layer.has_gate else layer.act_fn(rows)
            rows = self._product(layer, "down_proj", rows, slots.down[:size], ids[source], offsets)
            out.index_copy_(0, torch.where(places < offsets[-1], source, num_rows), rows)
            done += size
        return out[:-1]

    def _plan_passes(
        self, ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """By id, the number of its pass times S, plus its slot; by pass, the copies it needs."""
        num_experts, num_slots = self.table.num_experts, self.table.num_slots
        which = self.table.begin(ids)
        num_passes = self.table.num_passes(len(ids))
        keys = torch.full((num_experts + 1,), num_passes * num_slots, device=ids.device)
        copies = []
        for number in range(num_passes):
            wanted = which == number
            copies.append(self.table.load(wanted))
            slots = self.table.slots() + number * num_slots
            keys[:-1] = torch.where(wanted, slots, keys[:-1])
        return keys[ids.clamp(max=num_experts)], copies

    def _product(
        self,
        layer: Experts,
        name: str,
        rows: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        weight = weight if self._is_transposed else weight.transpose(1, 2)  # [G, in, out]
        out: torch.Tensor = functional.grouped_mm(rows, weight, offs=ends)
        if layer.has_bias:
            out = out + getattr(layer, f"{name}_bias")[ids.clamp(max=layer.num_experts - 1)]
        return out

    def _copy(self, experts: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy experts, -1 for none, to slots; on a GPU the device reads both lists."""
        if self.slots.payloads is not None and self.slots.payloads.device.type == "cuda":
            from hotset.kernels.copy_experts import copy_experts

            copy_experts(self.host.payloads, self.slots.payloads, experts, slots)
            return
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            if expert >= 0:
                self.slots.put(self.host, expert, slot, is_transposed=self._is_transposed)


class ExpertBuffer:
    """The buffers of all layers of a model.

    Attributes:
        device_bytes: of slots and staging buffers.
        host_bytes: of the only copy in host memory.
        description: one line, for the start.
    """

    def __init__(self, layers: list[Experts], config: EngineConfig, device: torch.device) -> None:
        hosts = [layer.expert_host for layer in layers]
        num_experts, layout = layers[0].num_experts, hosts[0].layout
        sizes = SlotBytes(config.expert_plan, len(layers), num_experts, layout.payload_bytes)
        num_slots = _num_slots(config, sizes)
        num_fixed = sizes.num_fixed(num_slots)
        packed = device.type == "cpu" and layout.dtype == torch.float32 and _can_pack()
        self._layout = layout
        # By layer: hits, misses, times streamed.
        self._counts = torch.zeros(len(layers), 3, dtype=torch.int64, device=device)
        self._num_staged = sizes.staged(num_slots)
        if device.type == "cuda":
            for host in hosts:
                host.pin()
        self._hosts = hosts
        self._staging = None
        if self._num_staged:
            transposed = [bool(layer.is_transposed) for layer in layers]
            self._staging = Staging(hosts, num_fixed, transposed, device, packed=packed)
        self.layers = []
        for index, layer in enumerate(layers):
            counts = self._counts[index]
            table = SlotTable(
                num_experts,
                num_slots,
                num_fixed=num_fixed,
                eviction=config.expert_eviction,
                counts=counts[:2],
            )
            layer.expert_buffer = LayerBuffer(
                index,
                hosts[index],
                table,
                self._staging,
                plan=config.expert_plan,
                streamed=counts[2:],
                packed=packed,
                is_transposed=bool(layer.is_transposed),
            )
            self.layers.append(layer.expert_buffer)
        self.device_bytes = sizes(num_slots)
        self.host_bytes = sum(host.payloads.nbytes for host in hosts)
        evicts = "" if config.expert_plan == "stream" else f", {config.expert_eviction} eviction"
        self.description = (
            f"experts: {num_slots} of {num_experts} in each of {len(layers)} layers resident, "
            f"{self.device_bytes / GIB:.3f} GiB on the {device.type}, "
            f"{self.host_bytes / GIB:.3f} GiB in host memory, plan {config.expert_plan}{evicts}"
        )

    def counts(self) -> ExpertCounts:
        """What the buffers did so far; waits for the device."""
        hits, misses, streamed = self._counts.sum(0).tolist()
        moved = (misses + streamed * self._num_staged) * self._layout.payload_bytes
        return ExpertCounts(hits, misses, moved)

    def reset_counts(self) -> None:
        """Count from zero."""
        self._counts.zero_()

    def join(self) -> None:
        """Have what is computed from here on wait for the copies started so far."""
        if self._staging is not None:
            self._staging.join()

    def close(self) -> None:
        """Unpin the host copy. No step may be under way, and none may follow."""
        if self._counts.device.type == "cuda":
            torch.cuda.synchronize(self._counts.device)
        for host in self._hosts:
            host.close()


def buffer_experts(model: PreTrainedModel, config: EngineConfig) -> tuple[ExpertBuffer | None, str]:
    """Move the experts of `model` to host memory and keep on the device what `config` allows.

    Layer by layer, so that no more than one layer is twice in memory. To be called before the model
    runs; its experts may be on the CPU, the rest on its device. A model that was given to it before
    is given other slots over the same host copy.

    Returns:
        None where `config` asks for no buffering, or its budget holds all experts; and what to say
        of it at start, empty for nothing.

    Raises:
        ConfigError: buffering is asked for and cannot be done, or the budget is too small; the
            model is unchanged.
    """
    if not config.buffers_experts:
        if any(hasattr(layer, "expert_host") for layer in experts_layers(model)):
            raise ConfigError(
                "the experts of this model are in host memory already; load it again, or give "
                "expert_slots or expert_gib"
            )
        return None, ""
    layers = _bufferable(model, config)
    sizes = SlotBytes(
        config.expert_plan, len(layers), layers[0].num_experts, _layout_of(layers[0]).payload_bytes
    )
    if _num_slots(config, sizes) == sizes.num_experts:
        _keep_all(layers, model.device)
        all_bytes = sizes.num_layers * sizes.num_experts * sizes.payload_bytes
        return None, (
            f"experts: all {sizes.num_experts} of each of {sizes.num_layers} layers resident, "
            f"{all_bytes / GIB:.3f} GiB on the {model.device.type}; nothing is buffered"
        )
    for layer in layers:
        if not hasattr(layer, "expert_host"):
            layer.expert_host = _move_to_host(layer)
    buffer = ExpertBuffer(layers, config, model.device)
    return buffer, buffer.description


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
    if any(hasattr(layer, "packed_down_proj") for layer in layers):
        raise ConfigError(
            f"{given}, but another engine has packed the experts of this {name}; load it again"
        )
    kinds = {(layer.num_experts, _layout_of(layer)) for layer in layers}
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


def _layout_of(layer: Experts) -> ExpertLayout:
    if hasattr(layer, "expert_host"):
        layout: ExpertLayout = layer.expert_host.layout
        return layout
    up, down = getattr(layer, up_name(layer)), layer.down_proj
    return ExpertLayout(tuple(up.shape[1:]), tuple(down.shape[1:]), up.dtype)


def _move_to_host(layer: Experts) -> HostExperts:
    host = HostExperts(_layout_of(layer), layer.num_experts)
    with torch.inference_mode():
        for name, target in ((up_name(layer), host.up), ("down_proj", host.down)):
            target.copy_(getattr(layer, name))
            setattr(layer, name, None)
    return host


def _keep_all(layers: list[Experts], device: torch.device) -> None:
    """All experts as weights on the device, from wherever they are."""
    for layer in layers:
        host: HostExperts | None = getattr(layer, "expert_host", None)
        for name in (up_name(layer), "down_proj"):
            weight = getattr(layer, name)
            if host is not None:
                weight = (host.down if name == "down_proj" else host.up).clone()
            parameter = nn.Parameter(weight.to(device), requires_grad=False)
            setattr(layer, name, parameter)
        if host is not None:
            host.close()
            layer.expert_buffer = None
            del layer.expert_host


def _can_pack() -> bool:
    return bool(torch.backends.mkldnn.is_available())
