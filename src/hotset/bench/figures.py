"""What an engine tells of a run, as plain data: its sizes, and its counters."""

from collections import Counter
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from hotset.bench.workload import Work
from hotset.engine.engine import Engine
from hotset.engine.status import engine_usage
from hotset.executor.probe import weights_bytes
from hotset.experts.weights import experts_layers
from hotset.metrics import Metrics


def sizes_of(engine: Engine, model: PreTrainedModel, work: Work) -> dict[str, Any]:
    """Bytes and tokens of the tiers, and the rates measured as the engine started."""
    sizes, block_size = engine.sizes, engine.sizes.block_size
    tiers = [info for info, _ in engine_usage(engine).tiers]
    known = sum(turn.known_tokens for session in work.sessions for turn in session.turns)
    return {
        "hot_tokens": sizes.device_blocks * block_size,
        "host_tokens": sum(tier.capacity_payloads for tier in tiers[:1]) * block_size,
        "disk_tokens": sum(tier.capacity_payloads for tier in tiers[1:]) * block_size,
        "hot_bytes": sizes.device_blocks * sizes.block_bytes,
        "host_bytes": sum(tier.capacity_bytes for tier in tiers[:1]),
        "disk_bytes": sum(tier.capacity_bytes for tier in tiers[1:]),
        "weights_bytes": sizes.weights_bytes + sizes.expert_bytes,
        "kv_bytes_per_token": sizes.block_bytes // block_size,
        "work_kv_tokens": work.kv_tokens,
        "work_known_tokens": known,
        "link_bytes_per_s": dict(engine.rates.link_bytes_per_s),
        "prefill_tokens_per_s": engine.rates.prefill_tokens_per_s,
        "max_model_len": engine.max_model_len,
        **_expert_sizes(engine, model),
    }


def _expert_sizes(engine: Engine, model: PreTrainedModel) -> dict[str, int]:
    layers = experts_layers(model)
    if not layers:
        return {}
    num_experts, buffer = layers[0].num_experts, engine.experts
    if buffer is None:
        device_bytes, host_bytes = sum(weights_bytes(e.module) for e in layers), 0
    else:
        device_bytes, host_bytes = buffer.device_bytes, buffer.host_bytes
    return {
        "experts_device_bytes": device_bytes,
        "experts_host_bytes": host_bytes,
        "expert_layers": len(layers),
        "experts_per_layer": num_experts,
        "expert_slots": num_experts if buffer is None else buffer.num_slots,
    }


def counters_since(before: Metrics, engine: Engine) -> dict[str, Any]:
    """What the engine counted since `before`, a copy of its metrics, and what follows from it."""
    engine.take_counts()
    now = engine.metrics
    found: dict[str, Any] = {}
    for one in fields(Metrics):
        first, last = getattr(before, one.name), getattr(now, one.name)
        is_many = isinstance(last, Counter)
        found[one.name] = dict(sorted((last - first).items())) if is_many else last - first
    steps, needed = found["steps"], found["expert_hits"] + found["expert_misses"]
    return found | {
        "expert_rounding_error": now.expert_rounding_error,  # fixed at start
        "mean_step_ms": found["step_s"] / steps * 1e3 if steps else None,
        "expert_hit_rate": found["expert_hits"] / needed if needed else None,
    }
