"""A Qwen3-MoE layer in decode with all experts resident: dynamic against transformers' gating."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hotset.bench.gating.layers import engine_ways, make_weights
from hotset.bench.gating.static import Shape, make_on, route
from hotset.bench.gating.sweep import Limits, percentiles_ms, seconds_of, sweep
from hotset.experts.weights import IMPLEMENTATION

_REPEATS = 20


@torch.inference_mode()
def compare_decode(
    shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, *, limits: Limits
) -> dict[str, Any]:
    """A Qwen3-MoE layer for one step of decode, all its experts resident.

    On a GPU as a CUDA graph, as the engine runs it, and launched call by call.
    """
    plain = make_weights(lambda: _qwen3_experts(shape, device, dtype))
    weights_bytes = sum(p.nbytes for p in plain.parameters())
    router = torch.randn(shape.num_experts, shape.hidden, device=device, dtype=dtype)
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    given = (x, *route(x, router, shape.top_k))
    distinct = int(given[1].unique().numel())
    limits = replace(limits, batches=[tokens], repeats=_REPEATS)
    rows = []
    for each in sweep(engine_ways(plain, shape, dtype, matrices=3), lambda _: given, limits):
        times: dict[str, Any] = {"eager": None, "graph": None}
        why_not = None if each.best else each.stopped_by
        if each.best is not None:
            times["eager"] = percentiles_ms(each.best.seconds)
            if device.type == "cuda":
                times["graph"], why_not = _time_graph(partial(each.way.run, *given))
        rows.append({"way": each.way.name, **times, "why_not": why_not})
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


def _time_graph(call: Callable[[], Any]) -> tuple[dict[str, float] | None, str | None]:
    """Percentiles of a call recorded as a CUDA graph, or why there are none."""
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
    graph.replay()
    times = [seconds_of(graph.replay, is_cuda=True) for _ in range(_REPEATS)]
    torch.cuda.empty_cache()
    return percentiles_ms(times), None
