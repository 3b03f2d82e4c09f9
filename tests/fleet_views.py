"""Fleets as a front may see them, for what shows them."""

from collections import Counter
from collections.abc import Sequence

from hotset.engine.status import EngineStatus, TierStatus
from hotset.fleet.status import (
    FleetCounts,
    FleetStatus,
    GivenUp,
    Moved,
    ReplicaState,
    ReplicaStatus,
    Why,
)
from hotset.metrics import Metrics

BLOCK_BYTES = 2**21


def engine_of(number: int, tiers: Sequence[str]) -> EngineStatus:
    """An engine under a load that depends on its number; each tier is 4 times the one before."""
    parts = []
    for place, name in enumerate(tiers):
        capacity = 512 * 4**place
        used = capacity * (3 + 5 * number % 7) // 10
        num_cells = min(1024, capacity)
        cells = (("h" if place == 0 else "c") * (used * num_cells // capacity)).ljust(
            num_cells, "f"
        )
        parts.append(TierStatus(name, capacity, used, BLOCK_BYTES, cells, capacity))
    moving, parked, waiting = 8 + number % 5, number % 3, number % 4
    users = "m" * moving + "p" * parked + "w" * waiting
    return EngineStatus(
        num_moving=moving,
        num_hot=0,
        num_fetching=0,
        num_parked=parked,
        num_waiting=waiting,
        users=users,
        tiers=tuple(parts),
        link_bytes_per_s={name: 5e10 for name in tiers[1:]},
        prefill_tokens_per_s=35_000.0,
        states=None,
    )


def replica_of(
    number: int, state: ReplicaState, tiers: Sequence[str], why: str = ""
) -> ReplicaStatus:
    """One replica."""
    metrics = Metrics(
        prompt_tokens=90_000 + 1000 * number,
        output_tokens=20_000 + 700 * number,
        cached_tokens=Counter(device=20_000, host=9_000 + 500 * number),
        moved_bytes=Counter({"device>host": 10**9 * (number + 1), "host>remote": 10**8}),
        tier_bytes=Counter({"remote first_read": 10**7, "remote declined": 10**9}),
    )
    return ReplicaStatus(
        replica_id=f"replica-{number}",
        address=f"/run/hotset/replica-{number}.sock",
        state=state,
        since_s=3.5 + 60 * number,
        why=why,
        fingerprint="5f2a90c1",
        num_open=4 + number % 3,
        queued_tokens=1200 * (number % 4),
        metrics=metrics,
        engine=None if state is ReplicaState.CONNECTING else engine_of(number, tiers),
    )


def fleet_of(
    num_serving: int,
    *,
    num_draining: int = 0,
    num_lost: int = 0,
    tiers: Sequence[str] = ("device", "host", "disk"),
) -> FleetStatus:
    """A fleet that has been busy for a while."""
    states = [ReplicaState.SERVING] * num_serving + [ReplicaState.DRAINING] * num_draining
    states += [ReplicaState.LOST] * num_lost
    why = "the link ended: connection reset by peer; 12 requests went on elsewhere"
    replicas = tuple(
        replica_of(i, state, tiers, why if state is ReplicaState.LOST else "")
        for i, state in enumerate(states)
    )
    counts = FleetCounts(drains=num_draining, late_outputs=num_lost)
    for i, one in enumerate(replicas):
        for place, reason in enumerate((Why.PREFIX, Why.LOAD, Why.RETRY, Why.RESUME)):
            counts.routed[one.replica_id, reason] = (400 + 37 * i) // 4**place
    if num_lost:
        counts.lost = num_lost
        counts.retried.update({Moved.LOST: 4, Moved.DRAINED: 1})
        counts.resumed.update({Moved.LOST: 11, Moved.DRAINED: 5})
        counts.given_up[GivenUp.POISONED] = 1
        for pause_s in (0.12, 0.2, 0.4, 5.3):
            counts.pause.observe(pause_s)
    counts.num_predicted, counts.predicted_tokens, counts.found_tokens = 940, 402_000, 391_500
    counts.predicted_ttft_s, counts.real_ttft_s = 58.0, 64.5
    return FleetStatus("front-0", "cost", replicas, counts)
