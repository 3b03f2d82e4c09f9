"""The replicas of a fleet, and where requests went, as JSON for the status page."""

from collections import Counter
from collections.abc import Mapping, Sequence

from hotset.fleet.status import FleetCounts, FleetStatus, ReplicaStatus
from hotset.server.body import Json

_NUMBERS = (
    *("lost", "silent", "drains", "late_outputs", "num_predicted", "predicted_tokens"),
    *("found_tokens", "predicted_ttft_s", "real_ttft_s", "snapshots"),
)
_BY_REASON = ("retried", "resumed", "given_up")
_USERS = ("moving", "hot", "fetching", "parked", "waiting")


def fleet_body(fleet: FleetStatus, rates: Mapping[str, float], others: Sequence[Json]) -> Json:
    """The replicas as this front sees them, and what all fronts did.

    `rates` are output tokens/s by replica, `others` the `counts_body` of each other front.
    """
    counts = counts_body(fleet.counts)
    for other in others:
        counts = _add(counts, other)
    by_replica = counts.pop("routed")
    total: Counter[str] = Counter()
    for routed in by_replica.values():
        total.update(routed)
    p50, p99 = fleet.counts.pause.percentiles(0.5, 0.99)
    return {
        "front_id": fleet.front_id,
        "num_fronts": 1 + len(others),
        "route": fleet.route,
        "replicas": [
            _replica(one, rates.get(one.replica_id, 0.0), by_replica.get(one.replica_id, {}))
            for one in fleet.replicas
        ],
        "routed": dict(total),
        **counts,
        "pause_s": {"p50": p50, "p99": p99},
    }


def counts_body(counts: FleetCounts) -> Json:
    """Numbers by name, in part by reason; `routed` by replica and reason."""
    routed: dict[str, dict[str, int]] = {}
    for (replica_id, why), count in dict(counts.routed).items():
        routed.setdefault(replica_id, {})[why] = count
    return {
        "routed": routed,
        **{name: dict(getattr(counts, name)) for name in _BY_REASON},
        **{name: getattr(counts, name) for name in _NUMBERS},
    }


def _add(one: Json, other: Json) -> Json:
    """Numbers of the same name together, at any depth."""
    return {
        name: _add(one.get(name, {}), other.get(name, {}))
        if isinstance(one.get(name, other.get(name)), dict)
        else one.get(name, 0) + other.get(name, 0)
        for name in {**one, **other}
    }


def _replica(one: ReplicaStatus, rate: float, routed: Mapping[str, int]) -> Json:
    engine = one.engine
    users = {name: 0 if engine is None else getattr(engine, f"num_{name}") for name in _USERS}
    return {
        "id": one.replica_id,
        "address": one.address,
        "state": one.state,
        "since_s": round(one.since_s, 1),
        "why": one.why,
        "fingerprint": one.fingerprint,
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
