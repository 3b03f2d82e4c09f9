"""Dynamic gating against static gating, and against transformers' experts.

For one layer, for a whole model of the paper's shape, and for decode with all experts resident.
Of E * C rows static gating computes, k * S are asked for: E * f / k is the waste that a ratio
comes from, and it stands beside each.
Source: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from hotset.bench.gating.decode import compare_decode
from hotset.bench.gating.layers import engine_ways, least_bytes, make_weights, packed_twin
from hotset.bench.gating.paper_model import PaperModel
from hotset.bench.gating.static import (
    Shape,
    dropped_share,
    make_layer,
    route,
    static_experts,
)
from hotset.bench.gating.sweep import Limits, Sweep, Way, sweep
from hotset.bench.gating.work import DECODE_SHAPES, Work
from hotset.bench.machine import release
from hotset.experts.gating import dynamic_experts
from hotset.units import GIB

_LAYER_SHARE = 0.45  # of the time that is left, when the model is still to come


def run(
    work: Work,
    *,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Make the comparisons; plain data, which `keep` gets after each of them too.

    Raises:
        ConfigError: a size that cannot be, or weights that do not fit.
    """
    model_sizes = work.batch_sizes(work.sequence) if work.layers else []
    start_s = time.monotonic()
    end_s = start_s + work.max_s
    memory_bytes = math.inf if work.memory_gib is None else work.memory_gib * GIB
    limits = Limits(work.batch_sizes(), memory_bytes, end_s, work.repeats)
    result: dict[str, Any] = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "work": asdict(work),
    }
    if work.decode:
        say(f"decode of {work.decode_tokens} tokens, all experts resident")
        shape = Shape(*DECODE_SHAPES[device.type])
        result["decode"] = compare_decode(shape, work.decode_tokens, device, dtype, limits=limits)
        release(device)
        keep(result)
    say("one MoE layer")
    left_s = end_s - time.monotonic()
    layer_end_s = time.monotonic() + left_s * (_LAYER_SHARE if work.layers else 1.0)
    result["layer"] = compare_layer(work, device, dtype, replace(limits, deadline_s=layer_end_s))
    release(device)
    keep(result)
    if work.layers:
        say(f"a model of {work.layers} layers")
        result["model"] = compare_model(work, device, dtype, replace(limits, batches=model_sizes))
        release(device)
    result["took_s"] = round(time.monotonic() - start_s, 1)
    return result


def compare_layer(
    work: Work, device: torch.device, dtype: torch.dtype, limits: Limits
) -> dict[str, Any]:
    """Every way for one MoE layer, without its router."""
    shape = Shape(work.experts, work.hidden, work.ffn, work.top_k)
    torch.manual_seed(1)
    router = torch.randn(shape.num_experts, shape.hidden, device=device, dtype=dtype)
    plain = make_weights(lambda: make_layer(shape, device=device, dtype=dtype))
    layer_bytes = sum(p.nbytes for p in plain.parameters())

    def prepare(tokens: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        return (x, *route(x, router, shape.top_k))

    def static(factor: float) -> Way:
        return Way(
            f"static f={factor:g}",
            partial(static_experts, plain, factor=factor),
            capacity=factor,
            least_bytes=lambda tokens: least_bytes(shape, factor, tokens, dtype.itemsize),
            dropped=lambda x, ids, weights: dropped_share(ids, shape.num_experts, factor),
        )

    ways = [*engine_ways(plain, shape, dtype, matrices=2), *map(static, work.factors)]
    return _summary(sweep(ways, prepare, limits), shape, layer_bytes)


def compare_model(
    work: Work, device: torch.device, dtype: torch.dtype, limits: Limits
) -> dict[str, Any]:
    """Every way but `batched_mm` for prefills of a whole model."""
    shape = Shape(work.experts, work.hidden, work.ffn, work.top_k)
    torch.manual_seed(2)
    model = make_weights(lambda: PaperModel(shape, work.layers, device, dtype))
    packed = [packed_twin(layer) for layer in model.moe]
    model_bytes = sum(p.nbytes for p in model.parameters())

    def prepare(tokens: int) -> tuple[torch.Tensor, ...]:
        length = min(tokens, work.sequence)
        return (torch.randn(tokens // length, length, shape.hidden, device=device, dtype=dtype),)

    def way(name: str, layers: Sequence[nn.Module], experts: Any, factor: float | None) -> Way:
        each = [partial(experts, layer) for layer in layers]
        return Way(
            name,
            lambda x: model(x, each),
            capacity=factor,
            least_bytes=lambda tokens: least_bytes(shape, factor, tokens, dtype.itemsize),
        )

    plain = list(model.moe)
    ways = [
        way("dynamic", packed, dynamic_experts, None),
        way("grouped_mm", plain, grouped_mm_experts_forward, None),
        *(
            way(f"static f={factor:g}", plain, partial(static_experts, factor=factor), factor)
            for factor in work.factors
        ),
    ]
    summary = _summary(sweep(ways, prepare, limits), shape, model_bytes)
    return summary | {"num_layers": work.layers, "num_moe_layers": len(model.moe)}


def _summary(sweeps: Sequence[Sweep], shape: Shape, weights_bytes: int) -> dict[str, Any]:
    dynamic, grouped = sweeps[0], sweeps[1]
    rows = []
    for each in sweeps:
        best, factor = each.best, each.way.capacity
        same = dynamic.at(best.tokens) if best else None
        rows.append(
            {
                "way": each.way.name,
                "waste_ef_over_k": None
                if factor is None
                else round(shape.num_experts * factor / shape.top_k, 4),
                "best_tokens": best and best.tokens,
                "best_tokens_per_s": best and round(best.tokens_per_s, 1),
                "dynamic_faster_by": _ratio(dynamic, each),
                "gating_alone_faster_by": _ratio(grouped, each),
                "peak_bytes_at_best": best and best.peak_bytes,
                # Weights and peak, at the batch that is best for this way.
                "dynamic_takes_less_by": round(
                    (weights_bytes + best.peak_bytes) / (weights_bytes + same.peak_bytes), 3
                )
                if best and same
                else None,
                "largest_tokens": each.points[-1].tokens if each.points else 0,
                "peak_bytes_at_largest": each.points[-1].peak_bytes if each.points else None,
                "stopped_by": each.stopped_by,
                "points": [point.as_dict() for point in each.points],
            }
        )
    return {"shape": vars(shape), "weights_bytes": weights_bytes, "ways": rows}


def _ratio(one: Sweep, other: Sweep) -> float | None:
    if one.best is None or other.best is None:
        return None
    return round(one.best.tokens_per_s / other.best.tokens_per_s, 3)
