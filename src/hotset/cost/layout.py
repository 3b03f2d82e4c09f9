"""What a layout of GPUs holds of a model, and which layouts can hold it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hotset.cost.params import FORMATS
from hotset.cost.shape import ModelShape
from hotset.errors import PlanError
from hotset.layout import Layout


def check_layout(layout: Layout, shape: ModelShape, gpus: int | None) -> None:
    """Raise PlanError where the layout cannot hold this model, or asks for more than `gpus`."""
    if gpus is not None and layout.gpus > gpus:
        raise PlanError(
            f"layout {layout} needs {layout.gpus} GPUs and {gpus} are given; "
            f"raise --gpus or shrink the layout"
        )
    _check_heads(layout.tp, shape)
    if layout != Layout(layout.tp, layout.dp):
        _check_experts(layout, shape)
    if shape.moe_layers:
        _check_slices(layout, shape)


def shares_heads(tp: int, num_heads: Iterable[int], num_kv_heads: int) -> bool:
    """Whether `tp` GPUs can share heads: of KV whole ones, or several GPUs the same one.

    Args:
        tp: number of GPUs.
        num_heads: of attention, of all layers.
        num_kv_heads: 0 for KV that each GPU has whole.
    """
    shares_kv = not num_kv_heads or num_kv_heads % tp == 0 or tp % num_kv_heads == 0
    return shares_kv and all(heads % tp == 0 for heads in num_heads)


def _check_heads(tp: int, shape: ModelShape) -> None:
    kv_heads = 0 if shape.is_mla else shape.min_kv_heads
    if shares_heads(tp, shape.num_heads, kv_heads):
        return
    most = max(shape.num_heads)
    fitting = [n for n in range(1, most + 1) if shares_heads(n, shape.num_heads, kv_heads)]
    possible = f"possible: {', '.join(map(str, fitting))}"
    for heads in shape.num_heads:
        if heads % tp:
            raise PlanError(
                f"tp={tp} does not divide the {heads} attention heads of {shape.name}; {possible}"
            )
    raise PlanError(
        f"tp={tp} neither divides the {kv_heads} KV heads of {shape.name} nor is a multiple of "
        f"them; {possible}"
    )


def _check_experts(layout: Layout, shape: ModelShape) -> None:
    """That experts can be spread as a layout says."""
    if not shape.moe_layers:
        word = f"ep={layout.ep}" if layout.ep > 1 else f"es={layout.es}"
        raise PlanError(f"{word} spreads experts, and {shape.name} has none; use tp and dp")
    if layout.expert_gpus % layout.tp or layout.gpus % layout.expert_gpus:
        what = f"ep={layout.ep}" + (f" x es={layout.es}" if layout.es > 1 else "")
        raise PlanError(
            f"{what} must be a multiple of tp={layout.tp} and divide the {layout.gpus} GPUs of "
            f"{layout}"
        )
    if layout.ep > 8 * shape.num_experts:
        raise PlanError(
            f"ep={layout.ep} is over eight GPUs for each of the {shape.num_experts} experts of "
            f"{shape.name}; use fewer"
        )


def _check_slices(layout: Layout, shape: ModelShape) -> None:
    """That each expert can be cut into `es` slices, along groups that share a scale."""
    width = math.gcd(*(layer.expert_width for layer in shape.moe_layers))
    if width % layout.es:
        raise PlanError(
            f"{layout.es} slices do not divide the width {width} of the experts of {shape.name}; "
            f"use ep={layout.es}, which spreads them whole"
        )
    stored, slice_width = FORMATS[shape.expert_dtype], width // layout.es
    group = stored.columns or 1
    if stored.code == "int4" and slice_width % group:
        fitting = math.gcd(width // group, layout.es) if width % group == 0 else 1
        raise PlanError(
            f"{shape.expert_dtype} has groups of {group} and {layout.es} slices of the experts of "
            f"{shape.name} are {slice_width} wide; use fp8, or "
            f"ep={layout.es // fitting},es={fitting}"
        )


def candidate_layouts(shape: ModelShape, gpus: int) -> list[Layout]:
    """Every layout of exactly `gpus` GPUs that can hold this model, simple ones first.

    Each way to cut experts over all GPUs, over 8 and over one group, whole or in slices.
    """
    result: list[Layout] = []
    for tp in (t for t in range(1, gpus + 1) if gpus % t == 0):
        dp = gpus // tp
        layouts = [Layout(tp, dp)]
        if shape.moe_layers:
            sizes = sorted({gpus, *((8,) if gpus % 8 == 0 else ())} - {1})
            layouts += [Layout(tp, dp, es=es) for es in sizes]
            layouts += [Layout(tp, dp, ep) for ep in sizes]
        for layout in layouts:
            try:
                check_layout(layout, shape, gpus)
            except PlanError:
                continue
            if layout not in result:
                result.append(layout)
    return result


@dataclass(frozen=True, slots=True)
class Shard:
    """What one GPU of a layout holds of a model, all experts resident.

    Attributes:
        dense_bytes: weights other than routed experts.
        dense_read_bytes: of those, what each decode step reads (no input embeddings).
        expert_slots: experts a layer keeps here (whole ones with ep, slices of all with tp).
        slot_bytes: bytes of one slot, over all MoE layers.
        experts_bytes: all slots.
    """

    dense_bytes: float
    dense_read_bytes: float
    expert_slots: int
    slot_bytes: float
    experts_bytes: float


def shard_model(shape: ModelShape, layout: Layout, *, has_whole_embedding: bool = False) -> Shard:
    """Cut a model for a layout, with all input embeddings on each rank or a part of them."""
    tp, ep = layout.tp, layout.ep
    embedding = float(shape.embedding_bytes)
    cut = embedding / tp
    held = embedding if has_whole_embedding else cut
    dense = shape.rank_dense_bytes(tp) + held
    slots = -(-shape.num_experts // ep)
    slot_bytes = sum(shape.layer_expert_bytes(layer, es=layout.es) for layer in shape.moe_layers)
    return Shard(
        dense_bytes=dense,
        # A tied head reads its part of the embeddings.
        dense_read_bytes=dense - held + (0.0 if shape.head.count else cut),
        expert_slots=slots,
        slot_bytes=slot_bytes,
        experts_bytes=slots * slot_bytes,
    )
