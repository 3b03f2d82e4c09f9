"""A Qwen3-MoE layer in decode with all experts resident: dynamic against transformers' gating."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hotset.bench.gating.layers import least_bytes, make_weights, packed_twin
from hotset.bench.gating.static import Experts, Shape, make_on, route
from hotset.bench.gating.sweep import Limits
from hotset.experts.gating import dynamic_experts
from hotset.experts.weights import IMPLEMENTATION
from hotset.units import GIB

_MIN_CALLS_S = 0.5  # of each way, after which its repeats end
_MAX_CALLS = 50


def compare_decode(
    shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, *, limits: Limits
) -> dict[str, Any]:
    """A Qwen3-MoE layer for one step of decode, all its experts resident.

    On a GPU as a CUDA graph, as the engine runs it, and launched call by call.
    """
    plain = make_weights(lambda: _qwen3_experts(shape, device, dtype))
    weights_bytes = sum(p.nbytes for p in plain.parameters())
    packed = packed_twin(plain)
    router = torch.randn(shape.num_experts, shape.hidden, device=device, dtype=dtype)
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    ids, weights = route(x, router, shape.top_k)
    ways: dict[str, Experts] = {
        "dynamic": partial(dynamic_experts, packed),
        "grouped_mm": partial(grouped_mm_experts_forward, plain),
        "batched_mm": partial(batched_mm_experts_forward, plain),
    }
    rows = []
    for name, experts in ways.items():
        gathers = name == "batched_mm"
        needed = least_bytes(shape, None, tokens, dtype.itemsize, gathers=gathers, matrices=3)
        row: dict[str, Any] = {"way": name, "eager": None, "graph": None, "why_not": None}
        rows.append(row)
        if needed > limits.memory_bytes:
            row["why_not"] = f"needs {needed / GIB:.2f} GiB or more"
            continue
        call = partial(experts, x, ids, weights)
        row["eager"], row["why_not"] = _time(call, device)
        if row["eager"] is not None and device.type == "cuda":
            row["graph"], row["why_not"] = _time_graph(call, device)
        torch.cuda.empty_cache()
    distinct = int(ids.unique().numel())
    _compare(rows, distinct * weights_bytes / shape.num_experts)
    return {
        "shape": vars(shape),
        "tokens": tokens,
        "distinct_experts": distinct,
        "weights_bytes": weights_bytes,
        "ways": rows,
    }


def _qwen3_experts(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights, the same in each call."""
    config = Qwen3MoeConfig(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.ffn,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = IMPLEMENTATION
    layer = make_on(device, dtype, 3, lambda: Qwen3MoeExperts(config))
    layer.requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(0, shape.hidden**-0.5)
    return layer


def _compare(rows: list[dict[str, Any]], read_bytes: float) -> None:
    """Add to each way the rate at which it read weights, and its time over the first way's."""
    for row in rows:
        for mode in ("eager", "graph"):
            ours, theirs = rows[0][mode], row[mode]
            if theirs is not None:
                theirs["weights_gb_per_s"] = round(read_bytes / theirs["p50_ms"] / 1e6, 1)
            both = ours is not None and theirs is not None
            row[f"dynamic_faster_by_{mode}"] = (
                round(theirs["p50_ms"] / ours["p50_ms"], 3) if both else None
            )


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
