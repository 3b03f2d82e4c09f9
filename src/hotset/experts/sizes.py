"""What slots for a model's experts take on the device, and what its layers cannot do."""

import math

import torch
from transformers import PreTrainedModel

from hotset.cost.slot_bytes import SlotBytes
from hotset.errors import ConfigError
from hotset.expert_options import ColdDType, HostedExperts
from hotset.experts.gating import layers_to_gate
from hotset.experts.narrow import NarrowLayout, rounded_layout
from hotset.experts.weights import LayerExperts
from hotset.kernels.narrow_forms import can_read
from hotset.parallel.collectives import largest
from hotset.parallel.group import current
from hotset.weight_format import INT4


def slot_bytes_of(model: PreTrainedModel, asked: HostedExperts) -> SlotBytes | None:
    """What slots of a model's experts take; None where its experts cannot be hosted.

    Raises:
        ConfigError: they are in host memory in other bits than asked for.
    """
    return None if why_not_hosted(model) else sizes_of(layers_to_gate(model), asked, model.device)


def why_not_hosted(model: PreTrainedModel) -> str:
    """Why no experts of a model can be kept in host memory; empty where they can."""
    name, layers = type(model).__name__, layers_to_gate(model)
    if not layers:
        return (
            f"{name} has no experts that can be kept in host memory: it is dense, or computes its "
            "experts in its own way"
        )
    if any(experts.shard is not None for experts in layers):
        return (
            f"the experts of this {name} are spread over ranks, which does not go with keeping "
            "them in host memory yet"
        )
    num_kinds = len({(each.num_experts, each.layout) for each in layers})
    if num_kinds > 1:
        return f"the layers of {name} have experts of {num_kinds} sizes, which are not supported"
    return ""


def sizes_of(layers: list[LayerExperts], asked: HostedExperts, device: torch.device) -> SlotBytes:
    """What slots of these layers take on `device`.

    Raises:
        ConfigError: they are in host memory in other bits than asked for.
    """
    first = layers[0]
    narrow = narrow_layout(first, asked.expert_cold_dtype)
    held = slots_hold(first, narrow, device)
    return SlotBytes(
        asked.expert_plan,
        len(layers),
        first.num_experts,
        (held or first.layout).payload_bytes,
        narrow.payload_bytes if narrow is not None and held is None else None,
    )


def slots_hold(
    experts: LayerExperts, narrow: NarrowLayout | None, device: torch.device
) -> NarrowLayout | None:
    """How slots have experts that are `narrow` in host memory; None is as they are computed with.

    On a GPU they have those of a checkpoint in its own bytes, which kernels widen in registers. On
    the CPU widening takes as long as 15 products of one row, so that slots have it behind them.

    Args:
        experts: of a layer.
        narrow: None where they are wide in host memory.
        device: with the slots; `meta` stands for a GPU.
    """
    if narrow is None or narrow.cold_dtype != "auto" or device.type == "cpu":
        return None
    is_known = experts.gate is not None and can_read(narrow.form)
    is_able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    is_half = experts.layout.dtype in (torch.bfloat16, torch.float16)
    return narrow if is_known and is_able and is_half else None


def _check_groups(experts: LayerExperts) -> None:
    """Raise ConfigError where a slice of an expert would have other scales than the whole one."""
    layout, slices = experts.layout, current().layout.es
    rows = (layout.down[-1], layout.up[-1])
    cut, whole_row = reversed(rows) if layout.is_transposed else rows
    width = cut if experts.is_sliced else cut // slices
    group = math.gcd(width * slices, whole_row, INT4.columns or 0)
    if width % group:
        raise ConfigError(
            f"expert_cold_dtype int4 has groups of {group} and {slices} slices of the experts of "
            f"this model are {width} wide; use fp8, or fewer GPUs"
        )


def narrow_layout(experts: LayerExperts, cold_dtype: ColdDType) -> NarrowLayout | None:
    """How host memory is to have experts, or ConfigError if it has them otherwise."""
    if experts.hosted is not None or experts.narrow is not None:
        stored = experts.narrow
        has = "auto" if stored is None else stored.cold_dtype
        if has != cold_dtype:
            where = "on the device" if experts.hosted is None else "in host memory"
            raise ConfigError(
                f"expert_cold_dtype is {cold_dtype}, but the experts of this model are {where} "
                f"as {has} already; load it again"
            )
        return stored
    if cold_dtype == "auto":
        return experts.narrow_in_file
    layout = experts.layout
    if cold_dtype == "int4":
        _check_groups(experts)
    return rounded_layout(
        layout.up, layout.down, cold_dtype, largest=largest if experts.is_sliced else None
    )
