"""The replicas of a fleet, and where requests went, as JSON for the status page."""

from collections import Counter
from collections.abc import Mapping

from hotset.fleet.status import FleetCounts, FleetStatus, ReplicaStatus, Why
from hotset.server.body import Json

_NUMBERS = (
    *("drains", "late_outputs", "num_predicted", "predicted_tokens", "found_tokens"),
    *("predicted_ttft_s", "real_ttft_s", "snapshots"),
)
_BY_REASON = ("retried", "resumed", "given_up", "lost")
_USERS = ("moving", "hot", "fetching", "parked", "waiting")


def fleet_body(fleet: FleetStatus, rates: Mapping[str, float]) -> Json:
    """`rates` are output tokens/s by replica."""
    counts = fleet.counts
    by_replica: dict[str, Counter[Why]] = {}
    for (replica_id, why), count in dict(counts.routed).items():
        by_replica.setdefault(replica_id, Counter())[why] += count
    return {
        "front_id": fleet.front_id,
        "route": fleet.route,
        "replicas": [
            _replica(one, rates.get(one.replica_id, 0.0), by_replica.get(one.replica_id, Counter()))
            for one in fleet.replicas
        ],
        **_counts(counts, sum(by_replica.values(), Counter())),
    }


def _counts(counts: FleetCounts, routed: Mapping[Why, int]) -> Json:
    p50, p99 = counts.pause.percentiles(0.5, 0.99)
    return {
        "routed": dict(routed),
        **{name: dict(getattr(counts, name)) for name in _BY_REASON},
        **{name: getattr(counts, name) for name in _NUMBERS},
        "pause_s": {"p50": p50, "p99": p99},
    }


def _replica(one: ReplicaStatus, rate: float, routed: Mapping[Why, int]) -> Json:
    engine = one.engine
    users = {name: 0 if engine is None else getattr(engine, f"num_{name}") for name in _USERS}
    return {
        "id": one.replica_id,
        "address": one.address,
        "state": one.state,
        "since_s": round(one.since_s, 1),
        "why": one.why,
        "fingerprint": one.fingerprint,
        "version": one.version,
        "num_open": one.num_open,
        "queued_tokens": one.queued_tokens,
        "output_tokens_per_s": rate,
        "users": users,
        "tiers": [
            {
                "name": tier.name,
                "used": tier.used,
                "capacity": tier.capacity,
                "block_bytes": tier.block_bytes,
            }
            for tier in (() if engine is None else engine.tiers)
        ],
        "prompt_tokens": one.metrics.prompt_tokens,
        "found_tokens": sum(dict(one.metrics.cached_tokens).values()),
        "routed": dict(routed),
    }
