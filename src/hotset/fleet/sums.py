"""Counters and snapshots of several engines as those of one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields

from hotset.engine.status import EngineStatus, StateStatus, TierStatus, sample
from hotset.metrics import Metrics

# What is fixed at the start and the same for all replicas of a model: no sum.
_LARGEST = {"expert_rounding_error"}


def sum_metrics(parts: Iterable[Metrics]) -> Metrics:
    """Counters of all of them together, in a new object."""
    total = Metrics()
    for part in parts:
        for one in fields(Metrics):
            mine, theirs = getattr(total, one.name), getattr(part, one.name)
            if isinstance(mine, Counter):
                mine.update(dict(theirs))  # a copy: the part may change meanwhile
            elif one.name in _LARGEST:
                setattr(total, one.name, max(mine, theirs))
            else:
                setattr(total, one.name, mine + theirs)
    return total


# Tiers that all replicas share: each of them tells the size of the whole.
_SHARED = {"remote"}


def merge_engines(parts: Sequence[EngineStatus]) -> EngineStatus:
    """Users, tiers and rates of all of them together.

    Tiers of a name are one where their blocks have the same size; of a shared store the largest
    view counts, as all replicas see the same. `cells` and `users` have at most
    1,024 letters again, at equal distances.
    """
    tiers: dict[tuple[str, int], list[TierStatus]] = {}
    for part in parts:
        for tier in part.tiers:
            tiers.setdefault((tier.name, tier.block_bytes), []).append(tier)
    links: Counter[str] = Counter()
    for part in parts:
        links.update(part.link_bytes_per_s)

    return EngineStatus(
        num_moving=sum(part.num_moving for part in parts),
        num_hot=sum(part.num_hot for part in parts),
        num_fetching=sum(part.num_fetching for part in parts),
        num_parked=sum(part.num_parked for part in parts),
        num_waiting=sum(part.num_waiting for part in parts),
        users="".join(sample("".join(part.users for part in parts))),
        tiers=tuple(_one_tier(same) for same in tiers.values()),
        link_bytes_per_s=dict(links),
        prefill_tokens_per_s=sum(part.prefill_tokens_per_s for part in parts),
        states=_one_state([part.states for part in parts if part.states is not None]),
    )


def _one_tier(parts: Sequence[TierStatus]) -> TierStatus:
    if parts[0].name in _SHARED:
        return max(parts, key=lambda part: (part.capacity, part.used))
    return TierStatus(
        name=parts[0].name,
        capacity=sum(part.capacity for part in parts),
        used=sum(part.used for part in parts),
        block_bytes=parts[0].block_bytes,
        cells="".join(sample("".join(part.cells for part in parts))),
        planned=sum(part.planned for part in parts),
    )


def _one_state(parts: Sequence[StateStatus]) -> StateStatus | None:
    if not parts:
        return None
    below: Counter[str] = Counter()
    for part in parts:
        below.update(part.below)
    return StateStatus(
        slot_bytes=max(part.slot_bytes for part in parts),
        num_slots=sum(part.num_slots for part in parts),
        num_held=sum(part.num_held for part in parts),
        num_kept=sum(part.num_kept for part in parts),
        below=dict(below),
    )
