"""Static gating against dynamic gating, for one MoE layer.

Static is what GShard and fairseq do: every expert gets C = ceil(f * S) rows of a batch of S tokens,
a dispatch mask `[S, E, C]` puts tokens there, experts compute all C rows, empty or not, and a token
that finds its expert full is dropped. Dynamic is `hotset.model.experts`, as the engine runs it.
Beside them the two implementations of transformers, on the same weights and routes.

Of E * C rows static computes, k * S are asked for: E * f / k is the waste a ratio comes from.
Source: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import (
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

from hotset.config import GIB
from hotset.errors import ConfigError
from hotset.model.experts import IMPLEMENTATION, dynamic_experts, pack_experts

CAPACITY_FACTORS = (0.05, 0.25, 1.0)


@dataclass(frozen=True)
class Shape:
    """One MoE layer: experts of two matrices with ReLU between, as in the paper.

    Attributes:
        num_experts: E.
        hidden: d.
        ffn: rows of an expert's first matrix.
        top_k: experts of a token.
    """

    num_experts: int
    hidden: int
    ffn: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.num_experts, self.hidden, self.ffn, self.top_k) < 1:
            raise ConfigError(f"every size of an MoE layer must be 1 or more: {self}")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top-{self.top_k} of {self.num_experts} experts is not possible")


@dataclass(frozen=True)
class Point:
    """What one batch size took.

    Attributes:
        tokens: S, the batch.
        seconds: of each repeat.
        peak_bytes: most memory in use during a call, beyond what was in use before it.
        dropped: share of the routed rows that were not computed.
    """

    tokens: int
    seconds: tuple[float, ...]
    peak_bytes: int
    dropped: float

    @property
    def tokens_per_s(self) -> float:
        """By the median repeat."""
        return self.tokens / float(np.median(self.seconds))


@dataclass
class Sweep:
    """One way over growing batches, and why it stopped."""

    way: str
    points: list[Point] = field(default_factory=list)
    stopped_by: str = ""

    @property
    def best(self) -> Point:
        """The batch with the highest throughput."""
        return max(self.points, key=lambda point: point.tokens_per_s)


class ExpertsConfig:
    """What transformers' experts interface reads of a config."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._experts_implementation = IMPLEMENTATION


@use_experts_implementation(has_gate=False)
class PaperExperts(nn.Module):
    """`[E, ffn, d]` and `[E, d, ffn]` weights with ReLU between, of transformers' interface."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        shape = config.shape
        self.num_experts = shape.num_experts
        self.act_fn = nn.ReLU()
        for name, rows, columns in (
            ("up_proj", shape.ffn, shape.hidden),
            ("down_proj", shape.hidden, shape.ffn),
        ):
            weight = torch.empty(shape.num_experts, rows, columns).normal_(0, columns**-0.5)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))


Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_layer(shape: Shape, *, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Experts with random weights, made on `device`; the next call gives equal ones."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            layer: nn.Module = PaperExperts(ExpertsConfig(shape))
    finally:
        torch.set_default_dtype(default)
    return layer


def route(
    hidden_states: torch.Tensor, router: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, k]` expert ids and weights that sum to 1 of `[S, d]` tokens, by a `[E, d]` router."""
    scores = (hidden_states @ router.T).float().softmax(-1)
    weights, ids = scores.topk(top_k, dim=-1)
    return ids, (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype)


def capacity_of(factor: float, tokens: int) -> int:
    """Rows of each expert: C = ceil(f * S)."""
    if not 0 < factor <= 1:
        raise ConfigError(
            f"a capacity factor of {factor:g} was given: above 0 and up to 1 is right"
        )
    return math.ceil(factor * tokens)


def dispatch_mask(ids: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    """`[k, S, E, C]` booleans: choice k of a token is row C of expert E.

    First choices of all tokens go before second ones, and earlier tokens before later, as in
    GShard (algorithm 1); what does not fit is nowhere.
    """
    chosen = nn.functional.one_hot(ids.T, num_experts)  # [k, S, E]
    flat = chosen.reshape(-1, num_experts)
    row = ((flat.cumsum(0) - 1) * flat).sum(-1).view(ids.shape[1], -1)  # [k, S]
    rows = torch.arange(capacity, device=ids.device)
    return chosen.bool().unsqueeze(-1) & (row[..., None, None] == rows)


def static_experts(
    layer: Any,
    hidden_states: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    factor: float,
) -> torch.Tensor:
    """`[S, d]` by static gating; arguments as for `dynamic_experts`."""
    num_tokens, top_k = ids.shape
    capacity = capacity_of(factor, num_tokens)
    dtype = hidden_states.dtype
    mask = dispatch_mask(ids, layer.num_experts, capacity)
    combine = mask[0].to(dtype) * weights[:, 0, None, None]  # [S, E, C]
    for choice in range(1, top_k):
        combine += mask[choice].to(dtype) * weights[:, choice, None, None]
    dispatch = mask.any(0).to(dtype)
    del mask
    rows = torch.einsum("sec,sd->ecd", dispatch, hidden_states)
    rows = layer.act_fn(torch.bmm(rows, layer.up_proj.transpose(1, 2)))
    rows = torch.bmm(rows, layer.down_proj.transpose(1, 2))
    return torch.einsum("sec,ecd->sd", combine, rows)


def dropped_share(ids: torch.Tensor, num_experts: int, factor: float) -> float:
    """Share of routed rows beyond the capacity of their expert."""
    counts = torch.bincount(ids.reshape(-1), minlength=num_experts)
    over = (counts - capacity_of(factor, len(ids))).clamp(min=0).sum()
    return float(over) / ids.numel()


def compare(
    shape: Shape,
    *,
    device: str,
    dtype: torch.dtype,
    factors: Sequence[float] = CAPACITY_FACTORS,
    max_tokens: int = 8192,
    memory_gib: float | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Run each way over batches of 16, 32, ... tokens until one does not fit; plain data.

    The ways take turns at each batch size, so that all find the machine alike.

    Args:
        shape: of the layer.
        device: `cpu` or `cuda`.
        dtype: of weights and tokens.
        factors: capacities of static gating.
        max_tokens: largest batch tried.
        memory_gib: what a call may take beside the weights. On a GPU the device is the limit; on
            a CPU it is this, 1 by default.
        repeats: timed calls of each batch, after one that is not.
        seed: of weights and tokens.

    Raises:
        ConfigError: a size or factor that cannot be.
    """
    if repeats < 1 or max_tokens < 1:
        raise ConfigError("repeats and the largest batch must be 1 or more")
    if memory_gib is None and device == "cpu":
        memory_gib = 1.0
    limit_bytes = math.inf if memory_gib is None else memory_gib * GIB
    torch.manual_seed(seed + 1)
    router = torch.randn(shape.num_experts, shape.hidden, device=device, dtype=dtype)
    layer = make_layer(shape, device=device, dtype=dtype, seed=seed)
    # As the engine has it; a packed layer has no weights that the others could use.
    packed = layer if device != "cpu" else make_layer(shape, device=device, dtype=dtype, seed=seed)
    pack_experts(packed)
    dropping = {f"static f={factor:g}": factor for factor in factors}
    ways: dict[str, Experts] = {
        "dynamic": functools.partial(dynamic_experts, packed),
        "grouped_mm": functools.partial(grouped_mm_experts_forward, layer),
        "batched_mm": functools.partial(batched_mm_experts_forward, layer),
    }
    for way, factor in dropping.items():
        ways[way] = functools.partial(static_experts, layer, factor=factor)
    sweeps = {way: Sweep(way) for way in ways}
    tokens = min(16, max_tokens)
    while running := {way: ways[way] for way, sweep in sweeps.items() if not sweep.stopped_by}:
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        _measure(x, router, shape, running, sweeps, dropping, limit_bytes, repeats)
        if tokens == max_tokens:
            for sweep in sweeps.values():
                sweep.stopped_by = sweep.stopped_by or "largest batch tried"
        tokens = min(2 * tokens, max_tokens)
    for sweep in sweeps.values():
        if not sweep.points:
            raise ConfigError(
                f"{sweep.way}: {sweep.stopped_by}; give more memory or a smaller layer"
            )
    dynamic = sweeps["dynamic"]
    waste = {way: shape.num_experts * f / shape.top_k for way, f in dropping.items()}
    return {
        "shape": vars(shape),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "memory_gib": memory_gib,
        "ways": [_as_dict(sweep, dynamic, waste.get(sweep.way)) for sweep in sweeps.values()],
    }


@torch.inference_mode()
def _measure(
    x: torch.Tensor,
    router: torch.Tensor,
    shape: Shape,
    ways: dict[str, Experts],
    sweeps: dict[str, Sweep],
    dropping: dict[str, float],
    limit_bytes: float,
    repeats: int,
) -> None:
    """Add one batch size to the sweeps of `ways`, which take turns, or say why it cannot be."""
    ids, weights = route(x, router, shape.top_k)
    tokens = len(x)
    peaks: dict[str, int] = {}
    for way, experts in ways.items():
        need = _least_bytes(way, shape, dropping.get(way), tokens, x.itemsize)
        if need > limit_bytes:
            sweeps[way].stopped_by = f"{tokens} need {need / GIB:.2f} GiB or more"
            continue
        try:
            peak = _peak_bytes(experts, x, ids, weights)
        except torch.OutOfMemoryError:
            sweeps[way].stopped_by = f"{tokens} do not fit into the device"
            continue
        if peak > limit_bytes:
            sweeps[way].stopped_by = f"{tokens} took {peak / GIB:.2f} GiB"
            continue
        peaks[way] = peak
    seconds: dict[str, list[float]] = {way: [] for way in peaks}
    for _ in range(repeats):
        for way in peaks:
            seconds[way].append(_seconds(ways[way], x, ids, weights))
    for way, peak in peaks.items():
        factor = dropping.get(way)
        dropped = 0.0 if factor is None else dropped_share(ids, shape.num_experts, factor)
        sweeps[way].points.append(Point(tokens, tuple(seconds[way]), peak, dropped))


def _least_bytes(way: str, shape: Shape, factor: float | None, tokens: int, itemsize: int) -> int:
    """What a way cannot do without, so that a CPU need not try what it has no memory for."""
    if factor is not None:
        rows = shape.num_experts * capacity_of(factor, tokens)
        return rows * (
            tokens * (shape.top_k + 2 * itemsize) + (shape.hidden + shape.ffn) * itemsize
        )
    per_row = shape.hidden + shape.ffn
    if way == "batched_mm":
        per_row += shape.hidden * shape.ffn
    return tokens * shape.top_k * per_row * itemsize


def _peak_bytes(experts: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> int:
    """Memory of one call beyond what is there before it; the call also warms up."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        experts(x, ids, weights)
        torch.cuda.synchronize(x.device)
        return torch.cuda.max_memory_allocated(x.device) - before
    experts(x, ids, weights)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        experts(x, ids, weights)
    in_use = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak


def _seconds(experts: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start_s = time.perf_counter()
    experts(x, ids, weights)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start_s


def _as_dict(sweep: Sweep, dynamic: Sweep, waste: float | None) -> dict[str, Any]:
    def percentiles(point: Point) -> dict[str, float]:
        return {
            f"p{p}_ms": round(float(np.percentile(point.seconds, p)) * 1e3, 3)
            for p in (0, 50, 90, 100)
        }

    return {
        "way": sweep.way,
        "best_tokens": sweep.best.tokens,
        "best_tokens_per_s": round(sweep.best.tokens_per_s, 1),
        "dynamic_faster_by": round(dynamic.best.tokens_per_s / sweep.best.tokens_per_s, 3),
        "waste_ef_over_k": waste,
        "largest_tokens": sweep.points[-1].tokens,
        "peak_bytes_at_largest": sweep.points[-1].peak_bytes,
        "stopped_by": sweep.stopped_by,
        "points": [
            {
                "tokens": point.tokens,
                "tokens_per_s": round(point.tokens_per_s, 1),
                "peak_bytes": point.peak_bytes,
                "dropped": round(point.dropped, 4),
                **percentiles(point),
            }
            for point in sweep.points
        ],
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The comparison as a table."""
    shape = result["shape"]
    lines = [
        f"E={shape['num_experts']}, d={shape['hidden']}, ffn={shape['ffn']}, "
        f"top-{shape['top_k']}, {result['dtype']}, {result['device']}",
        "",
        "| way | best tokens/s | at batch | dropped there | peak there, MiB | largest batch "
        "| dynamic faster by | E*f/k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in result["ways"]:
        best = next(p for p in way["points"] if p["tokens"] == way["best_tokens"])
        waste = way["waste_ef_over_k"]
        lines.append(
            f"| {way['way']} | {way['best_tokens_per_s']:,.0f} | {way['best_tokens']} "
            f"| {best['dropped']:.1%} | {best['peak_bytes'] / 2**20:,.1f} "
            f"| {way['largest_tokens']} ({way['stopped_by']}) "
            f"| {way['dynamic_faster_by']:.2f} | {'' if waste is None else f'{waste:g}'} |"
        )
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], out: Path) -> None:
    """Write `OUT.json` and `OUT.md`."""
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    machine = result["machine"]
    text = "# Static and dynamic gating of one MoE layer\n\n" + as_markdown(result)
    text += f"\n- command: `{result['command']}`, commit {machine['commit']}\n"
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    text += f"- hardware: {gpus or machine['cpu']}, {machine['cpu_threads']} CPU threads\n"
    text += f"- torch {machine['versions']['torch']}\n"
    out.with_suffix(".md").write_text(text, "utf-8")
