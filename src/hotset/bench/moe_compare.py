"""Dynamic gating against static gating, and against transformers' experts.

For one layer, for a whole model of the paper's shape, and for decode with all experts resident.
Of E * C rows static gating computes, k * S are asked for: E * f / k is the waste that a ratio
comes from, and it stands beside each.
Source: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hotset.bench.moe_gating import (
    Experts,
    Shape,
    capacity_of,
    dropped_share,
    make_layer,
    route,
    static_experts,
)
from hotset.bench.moe_sweep import Limits, Sweep, Way, sweep
from hotset.config import GIB
from hotset.errors import ConfigError
from hotset.experts.gating import dynamic_experts, pack_experts
from hotset.experts.weights import ATTRIBUTE, IMPLEMENTATION

M = TypeVar("M", bound=nn.Module)

_HEAD_DIM = 64
_FIRST_BATCH = 16
_LAYER_SHARE = 0.45  # of the time that is left, when the model is still to come
_MIN_CALLS_S = 0.5  # of each way of decode, after which its repeats end
_MAX_CALLS = 50


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
        _release()
        keep(result)
    say("one MoE layer")
    left_s = end_s - time.monotonic()
    layer_end_s = time.monotonic() + left_s * (_LAYER_SHARE if work.num_layers else 1.0)
    result["layer"] = compare_layer(work, device, dtype, replace(limits, deadline_s=layer_end_s))
    _release()
    keep(result)
    if work.num_layers:
        say(f"a model of {work.num_layers} layers")
        result["model"] = compare_model(work, device, dtype, replace(limits, batches=model_sizes))
        _release()
    result["took_s"] = round(time.monotonic() - start_s, 1)
    return result


def compare_layer(
    work: Work, device: torch.device, dtype: torch.dtype, limits: Limits
) -> dict[str, Any]:
    """Every way for one MoE layer, without its router."""
    shape = work.shape
    torch.manual_seed(1)
    router = torch.randn(shape.num_experts, shape.hidden, device=device, dtype=dtype)
    plain = _make(lambda: make_layer(shape, device=str(device), dtype=dtype))
    packed = _packed(plain)
    layer_bytes = sum(p.nbytes for p in plain.parameters())

    def prepare(tokens: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        return (x, *route(x, router, shape.top_k))

    def least(factor: float | None, gathers: bool, tokens: int) -> int:
        return _least_bytes(shape, factor, tokens, dtype.itemsize, gathers=gathers)

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


class PaperModel(nn.Module):
    """A decoder of the paper's kind: every second feed-forward is MoE.

    Without embedding and output head, which are the same for every way.
    """

    def __init__(self, shape: Shape, num_layers: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        d = shape.hidden
        self.shape = shape
        self.num_heads = max(1, d // _HEAD_DIM)
        if d % self.num_heads:
            raise ConfigError(f"a hidden size of {d} does not divide into heads of {_HEAD_DIM}")
        with torch.device(device):
            self.norms = nn.ModuleList(nn.LayerNorm(d, dtype=dtype) for _ in range(2 * num_layers))
            self.qkv = nn.ModuleList(nn.Linear(d, 3 * d, dtype=dtype) for _ in range(num_layers))
            self.out = nn.ModuleList(nn.Linear(d, d, dtype=dtype) for _ in range(num_layers))
            self.dense = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(d, shape.ffn, dtype=dtype),
                    nn.ReLU(),
                    nn.Linear(shape.ffn, d, dtype=dtype),
                )
                for _ in range(num_layers - num_layers // 2)
            )
            self.routers = nn.ParameterList(
                torch.randn(shape.num_experts, d, dtype=dtype) for _ in range(num_layers // 2)
            )
        self.moe = nn.ModuleList(
            make_layer(shape, device=str(device), dtype=dtype, seed=layer)
            for layer in range(num_layers // 2)
        )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, experts: Sequence[Experts]) -> torch.Tensor:
        """`[B, T, d]` to the same; `experts` compute the MoE layers, in order."""
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            x = x + out(self._attend(qkv(self.norms[2 * layer](x))))
            rows = self.norms[2 * layer + 1](x)
            if layer % 2 == 0:
                x = x + self.dense[layer // 2](rows)
                continue
            flat = rows.flatten(0, 1)
            ids, weights = route(flat, self.routers[layer // 2], self.shape.top_k)
            x = x + experts[layer // 2](flat, ids, weights).view_as(x)
        return x

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        batch, length, _ = qkv.shape
        heads = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return attended.transpose(1, 2).flatten(2)


def compare_model(
    work: Work, device: torch.device, dtype: torch.dtype, limits: Limits
) -> dict[str, Any]:
    """Every way but `batched_mm` for prefills of a whole model."""
    shape = work.shape
    torch.manual_seed(2)
    model = _make(lambda: PaperModel(shape, work.num_layers, device, dtype))
    packed = [_packed(layer) for layer in model.moe]
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
            least_bytes=lambda tokens: _least_bytes(shape, factor, tokens, dtype.itemsize),
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


def compare_decode(
    shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, *, limits: Limits
) -> dict[str, Any]:
    """A Qwen3-MoE layer for one step of decode, all its experts resident.

    On a GPU as a CUDA graph, as the engine runs it, and launched call by call.
    """
    config = Qwen3MoeConfig(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.ffn,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = IMPLEMENTATION

    def make() -> nn.Module:
        torch.manual_seed(3)
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                layer: nn.Module = Qwen3MoeExperts(config)
        finally:
            torch.set_default_dtype(default)
        layer.requires_grad_(False)
        for weight in layer.parameters():
            weight.normal_(0, shape.hidden**-0.5)
        return layer

    plain = _make(make)
    layer_bytes = sum(p.nbytes for p in plain.parameters())
    packed = _packed(plain)
    router = torch.randn(shape.num_experts, shape.hidden, device=device, dtype=dtype)
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    ids, weights = route(x, router, shape.top_k)
    distinct = int(ids.unique().numel())
    ways: dict[str, Experts] = {
        "dynamic": partial(dynamic_experts, packed),
        "grouped_mm": partial(grouped_mm_experts_forward, plain),
        "batched_mm": partial(batched_mm_experts_forward, plain),
    }
    rows = []
    for name, experts in ways.items():
        least_bytes = _least_bytes(
            shape, None, tokens, dtype.itemsize, gathers=name == "batched_mm", matrices=3
        )
        row: dict[str, Any] = {"way": name, "eager": None, "graph": None, "why_not": None}
        rows.append(row)
        if least_bytes > limits.memory_bytes:
            row["why_not"] = f"needs {least_bytes / GIB:.2f} GiB or more"
            continue
        call = partial(experts, x, ids, weights)
        row["eager"], row["why_not"] = _time(call, device)
        if row["eager"] is not None and device.type == "cuda":
            row["graph"], row["why_not"] = _time_graph(call, device)
        torch.cuda.empty_cache()
    need_bytes = distinct * layer_bytes / shape.num_experts
    for row in rows:
        for mode in ("eager", "graph"):
            ours, theirs = rows[0][mode], row[mode]
            if theirs is not None:
                theirs["weights_gb_per_s"] = round(need_bytes / theirs["p50_ms"] / 1e6, 1)
            both = ours is not None and theirs is not None
            row[f"dynamic_faster_by_{mode}"] = (
                round(theirs["p50_ms"] / ours["p50_ms"], 3) if both else None
            )
    return {
        "shape": vars(shape),
        "tokens": tokens,
        "distinct_experts": distinct,
        "weights_bytes": layer_bytes,
        "ways": rows,
    }


@torch.inference_mode()
def _time(
    call: Callable[[], Any], device: torch.device
) -> tuple[dict[str, Any] | None, str | None]:
    """Percentiles of a call, or why there are none."""
    try:
        for _ in range(2):
            call()
    except torch.OutOfMemoryError:
        return None, "does not fit into the device"
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < _MIN_CALLS_S and len(seconds) < _MAX_CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    times = {f"p{p}_ms": round(float(np.percentile(seconds, p)) * 1e3, 4) for p in (0, 50, 90)}
    return {**times, "calls": len(seconds)}, None


@torch.inference_mode()
def _time_graph(
    call: Callable[[], Any], device: torch.device
) -> tuple[dict[str, Any] | None, str | None]:
    """As `_time`, of the call recorded as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return None, "cannot be recorded: " + " ".join(str(error).split())[:120]
    return _time(graph.replay, device)


def _packed(layer: nn.Module) -> nn.Module:
    """The layer as the engine has it: on the CPU a packed one beside the plain one."""
    first = next(layer.parameters())
    if first.device.type != "cpu" or first.dtype != torch.float32:
        return layer
    twin: nn.Module = object.__new__(type(layer))
    twin.__dict__ = {name: value for name, value in layer.__dict__.items() if name != ATTRIBUTE}
    twin._parameters = dict(layer._parameters)
    twin._modules = dict(layer._modules)
    pack_experts(twin)
    return twin


def _make(make: Callable[[], M]) -> M:
    try:
        return make()
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the weights do not fit into the device; take fewer experts, or --layers 0"
        ) from None


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _least_bytes(
    shape: Shape,
    factor: float | None,
    tokens: int,
    itemsize: int,
    *,
    gathers: bool = False,
    matrices: int = 2,
) -> int:
    """What a way cannot do without; `gathers` the matrices of an expert for each row."""
    if factor is not None:
        rows = shape.num_experts * capacity_of(factor, tokens)
        return rows * (
            tokens * (shape.top_k + 2 * itemsize) + (shape.hidden + shape.ffn) * itemsize
        )
    per_row = shape.hidden + shape.ffn
    if gathers:
        per_row += (matrices - 1) * shape.hidden * shape.ffn
    return tokens * shape.top_k * per_row * itemsize


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
