"""Dynamic gating against static gating, and against transformers' experts.

For one layer, for a whole model of the paper's shape, and for decode with all experts resident.
Of E * C rows static gating computes, k * S are asked for: E * f / k is the waste that a ratio
comes from, and it stands beside each.
Source: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from hotset.bench.gating.decode import compare_decode
from hotset.bench.gating.layers import least_bytes, make_weights, packed_twin, release
from hotset.bench.gating.paper_model import PaperModel
from hotset.bench.gating.static import (
    Shape,
    capacity_of,
    dropped_share,
    make_layer,
    route,
    static_experts,
)
from hotset.bench.gating.sweep import Limits, Sweep, Way, sweep
from hotset.errors import ConfigError
from hotset.experts.gating import dynamic_experts
from hotset.units import GIB

_FIRST_BATCH = 16
_LAYER_SHARE = 0.45  # of the time that is left, when the model is still to come


@dataclass(frozen=True)
class Work:
    """What to compare.

    Attributes:
        shape: of an MoE layer.
        factors: capacities of static gating.
        num_layers: of the model, every second one MoE; 0 for none.
        sequence: tokens of a sequence in the model, for its attention.
        decode: Qwen3-MoE layer with its experts resident; None for none.
        decode_tokens: batch of that.
        batches: tokens of each batch; None for 16, 32, ... up to `max_tokens`.
        max_tokens: largest batch tried.
        memory_gib: what a call may take beside the weights; None for what the device has.
        repeats: timed calls of each batch.
        max_s: what would take longer altogether is not begun.
    """

    shape: Shape
    factors: Sequence[float]
    num_layers: int
    sequence: int
    decode: Shape | None
    decode_tokens: int
    batches: Sequence[int] | None
    max_tokens: int
    memory_gib: float | None
    repeats: int
    max_s: float

    def __post_init__(self) -> None:
        counts = (self.sequence, self.decode_tokens, self.max_tokens, self.repeats)
        if min(counts) < 1 or self.num_layers < 0:
            raise ConfigError("layers must be 0 or more; tokens and repeats 1 or more")
        if self.num_layers == 1:
            raise ConfigError("a model of 1 layer has no MoE layer: give 2 or more, or 0 for none")
        if not self.factors:
            raise ConfigError("no capacity factor is given; for example 0.05,0.25,1.0 is right")
        for factor in self.factors:
            capacity_of(factor, 1)
        if self.batches is not None and (not self.batches or min(self.batches) < 1):
            raise ConfigError("every batch must be 1 token or more")
        if not self.max_s > 0:
            raise ConfigError(f"{self.max_s:g} s are given; expected seconds above 0")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ConfigError(f"memory of {self.memory_gib:g} GiB is given; expected more than 0")

    def batch_sizes(self, multiple_of: int = 1) -> list[int]:
        """Batches in ascending order, those above a multiple being multiples."""
        if self.batches is not None:
            sizes = sorted(set(self.batches))
        else:
            sizes = [min(_FIRST_BATCH, self.max_tokens)]
            while sizes[-1] < self.max_tokens:
                sizes.append(min(2 * sizes[-1], self.max_tokens))
        for size in sizes:
            if size > multiple_of and size % multiple_of:
                raise ConfigError(
                    f"a batch of {size} tokens is not whole sequences of {multiple_of}"
                )
        return sizes


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
    model_sizes = work.batch_sizes(work.sequence) if work.num_layers else []
    start_s = time.monotonic()
    end_s = start_s + work.max_s
    memory_bytes = math.inf if work.memory_gib is None else work.memory_gib * GIB
    limits = Limits(work.batch_sizes(), memory_bytes, end_s, work.repeats)
    result: dict[str, Any] = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "work": asdict(work),
    }
    if work.decode is not None:
        say(f"decode of {work.decode_tokens} tokens, all experts resident")
        result["decode"] = compare_decode(
            work.decode, work.decode_tokens, device, dtype, limits=limits
        )
        release()
        keep(result)
    say("one MoE layer")
    left_s = end_s - time.monotonic()
    layer_end_s = time.monotonic() + left_s * (_LAYER_SHARE if work.num_layers else 1.0)
    result["layer"] = compare_layer(work, device, dtype, replace(limits, deadline_s=layer_end_s))
    release()
    keep(result)
    if work.num_layers:
        say(f"a model of {work.num_layers} layers")
        result["model"] = compare_model(work, device, dtype, replace(limits, batches=model_sizes))
        release()
    result["took_s"] = round(time.monotonic() - start_s, 1)
    return result


def compare_layer(
    work: Work, device: torch.device, dtype: torch.dtype, limits: Limits
) -> dict[str, Any]:
    """Every way for one MoE layer, without its router."""
    shape = work.shape
    torch.manual_seed(1)
    router = torch.randn(shape.num_experts, shape.hidden, device=device, dtype=dtype)
    plain = make_weights(lambda: make_layer(shape, device=device, dtype=dtype))
    packed = packed_twin(plain)
    layer_bytes = sum(p.nbytes for p in plain.parameters())

    def prepare(tokens: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        return (x, *route(x, router, shape.top_k))

    def least(factor: float | None, gathers: bool, tokens: int) -> int:
        return least_bytes(shape, factor, tokens, dtype.itemsize, gathers=gathers)

    ways = [
        Way("dynamic", partial(dynamic_experts, packed), least_bytes=partial(least, None, False)),
        Way(
            "grouped_mm",
            partial(grouped_mm_experts_forward, plain),
            least_bytes=partial(least, None, False),
        ),
        Way(
            "batched_mm",
            partial(batched_mm_experts_forward, plain),
            least_bytes=partial(least, None, True),
        ),
        *(
            Way(
                f"static f={factor:g}",
                partial(static_experts, plain, factor=factor),
                capacity=factor,
                least_bytes=partial(least, factor, False),
                dropped=lambda x, ids, weights, f=factor: dropped_share(ids, shape.num_experts, f),
            )
            for factor in work.factors
        ),
    ]
    return _summary(sweep(ways, prepare, limits), shape, layer_bytes)


def compare_model(
    work: Work, device: torch.device, dtype: torch.dtype, limits: Limits
) -> dict[str, Any]:
    """Every way but `batched_mm` for prefills of a whole model."""
    shape = work.shape
    torch.manual_seed(2)
    model = make_weights(lambda: PaperModel(shape, work.num_layers, device, dtype))
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
    return summary | {"num_layers": work.num_layers, "num_moe_layers": len(model.moe)}


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
