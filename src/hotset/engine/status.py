"""What the engine holds and does at one moment, for a person to look at."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from hotset.kv.cache import KVCache
from hotset.memory.tier import TierInfo, TierUsage
from hotset.metrics import RankMemory

if TYPE_CHECKING:
    from hotset.engine.engine import Engine

T = TypeVar("T")

_MOST_CELLS = 1024

# One letter per block or slot.
FREE, CACHED, HELD, SHARED, ARRIVING, LEAVING = "fchsad"
# One letter per user.
MOVING, HOT, FETCHING, PARKED, WAITING = "mhapw"


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier of KV memory.

    Attributes:
        capacity: blocks it can hold; `used` of them hold content.
        planned: blocks it will hold: host memory becomes ready beside the start.
        cells: states of its blocks, or of `len(cells)` of them at equal distances. Device: free,
            cached (not held, findable), held by one request, shared by several, arriving and
            leaving (a copy to host memory runs). Host: free, cached, held (being read or
            written) and arriving. Of a disk only the share that is used is known.
    """

    name: str
    capacity: int
    used: int
    block_bytes: int
    cells: str
    planned: int


@dataclass(frozen=True, slots=True)
class StateStatus:
    """The states of requests, of a model whose layers keep one beside KV.

    Attributes:
        slot_bytes: of one.
        num_slots: on the device.
        num_held: of these, in use by requests and copies.
        num_kept: of the others, those with a state that can be found.
        below: by tier, how many of the last 1,024 states that went down it has.
    """

    slot_bytes: int
    num_slots: int
    num_held: int
    num_kept: int
    below: dict[str, int]


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot, taken between two steps.

    Attributes:
        num_moving: requests with tokens to compute now, all of whose tokens are on the device.
        num_hot: likewise, with those on the device that were used last, and all in host memory.
        num_fetching: running requests that wait for blocks on their way up.
        num_parked: preempted ones, their KV in a slower tier.
        num_waiting: not started yet.
        users: one letter per request, in the order in which they run, at most 1,024.
        link_bytes_per_s: by tier, the rate its payloads reach the device with, as measured.
        states: None where layers keep none.
        ranks: what each one has of the memory, rank 0 first.
    """

    num_moving: int
    num_hot: int
    num_fetching: int
    num_parked: int
    num_waiting: int
    users: str
    tiers: tuple[TierStatus, ...]
    link_bytes_per_s: dict[str, float]
    prefill_tokens_per_s: float
    states: StateStatus | None
    ranks: tuple[RankMemory, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """How much lies where, and how many requests there are; cheap to take between two steps.

    Attributes:
        device_held: bytes of KV on the device that requests hold.
        device_cached: bytes of KV on the device that none holds, and that can be found.
        tiers: below the device, the fastest first.
    """

    num_running: int
    num_waiting: int
    device_held: int
    device_cached: int
    tiers: tuple[tuple[TierInfo, TierUsage], ...]


def engine_usage(engine: "Engine") -> Usage:
    """Look at the engine; to be called from its thread."""
    schedulers = [lane.scheduler for lane in engine.lanes]
    pools = [lane.kv.pool for lane in engine.lanes]
    stacks = [lane.tiers for lane in engine.lanes if lane.tiers is not None]
    by_lane = [list(zip(tiers.infos, tiers.usage(), strict=True)) for tiers in stacks]
    return Usage(
        sum(len(scheduler.running) for scheduler in schedulers),
        sum(len(scheduler.waiting) for scheduler in schedulers),
        sum(pool.num_held for pool in pools) * engine.sizes.block_bytes,
        sum(pool.num_cached for pool in pools) * engine.sizes.block_bytes,
        tuple(_together(parts) for parts in zip(*by_lane, strict=True)),
    )


def _together(parts: Sequence[tuple[TierInfo, TierUsage]]) -> tuple[TierInfo, TierUsage]:
    """One tier of all lanes."""
    (info, first), *others = parts
    if not others:
        return info, first
    usages = [usage for _, usage in parts]
    has_states = all(usage.states is not None for usage in usages)
    return (
        replace(info, capacity_payloads=sum(one.capacity_payloads for one, _ in parts)),
        TierUsage(
            sum(usage.used_payloads for usage in usages),
            sum(usage.capacity_payloads for usage in usages),
            _summed([usage.faults for usage in usages]),
            "".join(usage.states or "" for usage in usages) if has_states else None,
            _summed([usage.byte_counts for usage in usages]),
        ),
    )


def _summed(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(total)


def engine_status(engine: "Engine", *, num_queued: int) -> EngineStatus:
    """Look at the engine; to be called from its thread. `num_queued` requests wait before it."""
    engine.take_counts()
    for lane in engine.lanes:
        lane.kv.poll()  # an engine that idles takes no note of host memory that became ready
    schedulers = [lane.scheduler for lane in engine.lanes]
    users = [
        FETCHING if one.kv.arriving else MOVING if one.kv.seat is None else HOT
        for scheduler in schedulers
        for one in scheduler.running
    ]
    users += [
        PARKED if request.queue.num_preemptions else WAITING
        for scheduler in schedulers
        for request in scheduler.waiting
    ]
    users += [WAITING] * num_queued
    count = Counter(users)
    return EngineStatus(
        num_moving=count[MOVING],
        num_hot=count[HOT],
        num_fetching=count[FETCHING],
        num_parked=count[PARKED],
        num_waiting=count[WAITING],
        users="".join(users[:_MOST_CELLS]),
        tiers=tuple(_tiers(engine)),
        link_bytes_per_s=dict(engine.rates.link_bytes_per_s),
        prefill_tokens_per_s=engine.rates.prefill_tokens_per_s,
        states=_states(engine),
        ranks=_ranks(engine),
    )


def _ranks(engine: "Engine") -> tuple[RankMemory, ...]:
    """As they said last; the link of one rank alone is the engine's."""
    found = tuple(engine.memory())
    if len(found) > 1:
        return found
    rate = engine.rates.link_bytes_per_s.get("host", 0.0)
    return tuple(replace(one, link_bytes_per_s=rate) for one in found)


def _states(engine: "Engine") -> StateStatus | None:
    sizes, states = engine.sizes.states, engine.kv.states
    if sizes is None or states is None:
        return None
    pool = states.slots.pool
    return StateStatus(
        sizes.slot_bytes, pool.num_blocks, pool.num_held, pool.num_cached, states.num_below()
    )


def _tiers(engine: "Engine") -> list[TierStatus]:
    pools = [lane.kv.pool for lane in engine.lanes]
    num_usable = sum(pool.num_usable for pool in pools)
    found = [
        TierStatus(
            "device",
            num_usable,
            sum(pool.num_held + pool.num_cached for pool in pools),
            engine.sizes.block_bytes,
            _device_cells([lane.kv for lane in engine.lanes]),
            num_usable,
        )
    ]
    for info, usage in engine_usage(engine).tiers:
        found.append(
            TierStatus(
                info.name,
                usage.capacity_payloads,
                usage.used_payloads,
                info.payload_bytes,
                _cells(usage),
                info.capacity_payloads,
            )
        )
    return found


def _device_cells(caches: Sequence[KVCache]) -> str:
    """The blocks of one lane after another's."""
    distance = -(-sum(kv.pool.num_usable for kv in caches) // _MOST_CELLS)
    cells = []
    for kv in caches:
        pool = kv.pool
        arriving, leaving = kv.transfers.moving_blocks()
        for block in range(pool.first, pool.num_blocks, max(1, distance)):
            if block in arriving:
                cells.append(ARRIVING)
            elif block in leaving:
                cells.append(LEAVING)
            elif held := pool.ref_count(block):
                cells.append(HELD if held == 1 else SHARED)
            else:
                cells.append(CACHED if pool.is_shared(block) else FREE)
    return "".join(cells)


def _cells(usage: TierUsage) -> str:
    if usage.states is not None:
        return "".join(sample(usage.states))
    num_cells = min(_MOST_CELLS, usage.capacity_payloads)
    num_used = -(-usage.used_payloads * num_cells // max(1, usage.capacity_payloads))
    return CACHED * num_used + FREE * (num_cells - num_used)


def sample(values: Sequence[T]) -> Sequence[T]:
    """At most `_MOST_CELLS` of the values, at equal distances."""
    return values[:: -(-len(values) // _MOST_CELLS)] if values else values
