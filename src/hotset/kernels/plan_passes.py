"""Which experts come into which slots in each pass of a step, decided in one launch."""

import torch
import triton
import triton.language as tl

from hotset.eviction import By, Policy

MOST_EXPERTS = 1024
_NUMBERS = {By.ARRIVAL: 0, By.LAST_USE: 1, By.NUM_USES: 2}

_IDS_AT_ONCE = 1024
# A slot's rank times this, plus its number: ties go by number.
_RANK: tl.constexpr = tl.constexpr(1024)
_LARGEST: tl.constexpr = tl.constexpr(1 << 50)
_HELD: tl.constexpr = tl.constexpr(1 << 62)
_CURRENT: tl.constexpr = tl.constexpr(1 << 61)


@triton.jit  # type: ignore[untyped-decorator]
def _begin(  # type: ignore[no-untyped-def]
    slot_of, num_uses, predicted, pass_of, counts, ids, num_ids, active, num_passes, e, is_expert,
    E: tl.constexpr, EXPERTS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Count what a step needs, as `SlotTable.begin`; which are needed, and the pass of each."""
    tl.store(pass_of + e, tl.zeros((EXPERTS,), tl.int64), mask=is_expert)
    tl.debug_barrier()
    for start in range(0, num_ids, IDS):
        i = start + tl.arange(0, IDS)
        expert = tl.load(ids + i, mask=i < num_ids, other=E)
        tl.store(pass_of + expert, tl.full((IDS,), 1, tl.int64), mask=expert < E)
    tl.debug_barrier()
    needed = tl.load(pass_of + e, mask=is_expert, other=0) > 0
    here = tl.load(slot_of + e, mask=is_expert, other=-1) >= 0
    guessed = tl.load(predicted + e, mask=is_expert, other=0) > 0
    hit, miss = (needed & here).to(tl.int64), (needed & ~here).to(tl.int64)
    num_hits = tl.sum(hit)
    tl.store(counts, tl.load(counts) + num_hits)
    tl.store(counts + 1, tl.load(counts + 1) + tl.sum(miss))
    tl.store(counts + 2, tl.load(counts + 2) + tl.sum(guessed.to(tl.int64)))
    tl.store(counts + 3, tl.load(counts + 3) + tl.sum((guessed & needed).to(tl.int64)))
    tl.store(predicted + e, tl.zeros((EXPERTS,), tl.int64), mask=is_expert)
    uses = tl.load(num_uses + e, mask=is_expert, other=0) + 1
    tl.store(num_uses + e, uses, mask=needed)
    rank = tl.where(needed & here, tl.cumsum(hit, 0), num_hits + tl.cumsum(miss, 0)) - 1
    return needed, tl.where(needed, rank // active, num_passes)


@triton.jit  # type: ignore[untyped-decorator]
def _victims(  # type: ignore[no-untyped-def]
    last_use, num_uses, pass_of, expert_in, arrival, now, number, active, s, is_slot,
    BY: tl.constexpr, LARGEST_FIRST: tl.constexpr, SPARES_CURRENT: tl.constexpr,
):  # fmt: skip
    """All slots in the order of the policy; those that the pass needs, and then unused ones, last.

    As `SlotTable.load` has them.
    """
    holder = tl.load(expert_in + s, mask=is_slot, other=0)
    if BY == 0:
        by = tl.load(arrival + s, mask=is_slot, other=0)
    elif BY == 1:
        by = tl.load(last_use + holder)
    else:
        by = tl.load(num_uses + holder)
    if LARGEST_FIRST:
        by = _LARGEST - by
    order = by * _RANK + s
    if SPARES_CURRENT:
        order += (tl.load(last_use + holder) == now).to(tl.int64) * _CURRENT
    held = tl.load(pass_of + holder) == number
    order = tl.where(held, _HELD + s, order)
    order = tl.where(s < active, order, _HELD + _CURRENT + s)
    return tl.sort(order) % _RANK


@triton.jit  # type: ignore[untyped-decorator]
def _swap(  # type: ignore[no-untyped-def]
    slot_of, expert_in, arrival, experts, slots, victim, missing, place, num_missing, came, e, s,
    is_slot, SLOTS: tl.constexpr,
):  # fmt: skip
    """Give the missing experts, by number, the first of the victims' slots; lists both."""
    goes = s < num_missing
    gone = tl.load(expert_in + victim, mask=goes, other=0)
    tl.store(slot_of + gone, tl.full((SLOTS,), -1, tl.int64), mask=goes)
    tl.store(slots + s, victim, mask=is_slot)
    tl.store(experts + s, tl.full((SLOTS,), -1, tl.int64), mask=is_slot)
    tl.debug_barrier()
    slot = tl.load(slots + place, mask=missing, other=0)
    tl.store(slot_of + e, slot, mask=missing)
    tl.store(expert_in + slot, e, mask=missing)
    tl.store(arrival + slot, came + place + 1, mask=missing)
    tl.store(experts + place, e, mask=missing)


@triton.jit  # type: ignore[untyped-decorator]
def _plan_passes(  # type: ignore[no-untyped-def]
    state,
    counts,
    ids,
    keys,
    experts,
    slots,
    num_ids,
    num_passes,
    E: tl.constexpr,
    S: tl.constexpr,
    BY: tl.constexpr,
    LARGEST_FIRST: tl.constexpr,
    SPARES_CURRENT: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    IDS: tl.constexpr,
):
    # One program, whose threads tell each other through memory: barriers order that.
    slot_of = state
    last_use = slot_of + E + 1
    num_uses = last_use + E + 1
    predicted = num_uses + E + 1
    pass_of = predicted + E + 1
    expert_in = pass_of + E + 1
    arrival = expert_in + S + 1
    time = arrival + S + 1
    arrivals = time + 1
    active = tl.load(arrivals + 1)
    e, s = tl.arange(0, EXPERTS).to(tl.int64), tl.arange(0, SLOTS).to(tl.int64)
    is_expert, is_slot = e < E, s < S

    needed, which = _begin(
        slot_of, num_uses, predicted, pass_of, counts, ids, num_ids, active, num_passes, e,
        is_expert, E, EXPERTS, IDS,
    )  # fmt: skip
    now = tl.load(time) + 1
    tl.store(last_use + e, now + tl.zeros((EXPERTS,), tl.int64), mask=needed)
    came = tl.load(arrivals)
    tl.debug_barrier()  # all have read what is written now
    tl.store(time, now)
    tl.store(pass_of + e, which, mask=is_expert)
    tl.store(keys + e, tl.zeros((EXPERTS,), tl.int64) + num_passes * S, mask=e <= E)
    tl.debug_barrier()

    for number in range(num_passes):
        wanted = which == number
        missing = wanted & (tl.load(slot_of + e, mask=is_expert, other=0) < 0)
        num_missing = tl.sum(missing.to(tl.int64))
        place = tl.cumsum(missing.to(tl.int64), 0) - 1
        victim = _victims(
            last_use, num_uses, pass_of, expert_in, arrival, now, number, active, s, is_slot,
            BY, LARGEST_FIRST, SPARES_CURRENT,
        )  # fmt: skip
        _swap(
            slot_of, expert_in, arrival, experts + number * S, slots + number * S, victim,
            missing, place, num_missing, came, e, s, is_slot, SLOTS,
        )  # fmt: skip
        came += num_missing
        tl.debug_barrier()
        slot = tl.load(slot_of + e, mask=wanted, other=0)
        tl.store(keys + e, number * S + slot, mask=wanted)
        tl.debug_barrier()
    tl.store(arrivals, came)


def plan_passes(
    state: torch.Tensor,
    counts: torch.Tensor,
    ids: torch.Tensor,
    *,
    num_experts: int,
    num_slots: int,
    num_passes: int,
    policy: Policy,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Begin a step of a `experts.residency.SlotTable` and load all its passes, in place.

    E = experts, at most 1024; S = slots; P = passes; N = ids.

    Args:
        state: int64 on the device, contiguous, as `SlotTable` lays it out. Mutated.
        counts: `[5]` int64 on the device. Mutated.
        ids: `[N]` int64 on the device; ids of E and more belong to no expert here.
        num_experts: E.
        num_slots: S.
        num_passes: P, at least as many as the step takes with the slots that are in use.
        policy: says who goes first.

    Returns:
        `[E + 1]` int64, of an expert its pass times S plus its slot, P * S for those that are not
        needed; `[P, S]` int64 experts to be copied in each pass, -1 for none; and their slots.

    Cost: one launch of one program. Nothing is asked of the host, so that a CUDA graph can record
    it.
    Reference: `SlotTable.begin` and `load`, bit-exact.
    """
    assert num_experts <= MOST_EXPERTS
    keys = ids.new_empty(num_experts + 1)
    experts, slots = ids.new_empty(2, num_passes, num_slots)
    _plan_passes[(1,)](
        state,
        counts,
        ids,
        keys,
        experts,
        slots,
        len(ids),
        num_passes,
        E=num_experts,
        S=num_slots,
        BY=_NUMBERS[policy.by],
        LARGEST_FIRST=policy.largest_first,
        SPARES_CURRENT=policy.spares_current,
        EXPERTS=triton.next_power_of_2(num_experts + 1),
        SLOTS=triton.next_power_of_2(num_slots),
        IDS=_IDS_AT_ONCE,
        num_warps=4,
    )
    return keys, experts, slots
