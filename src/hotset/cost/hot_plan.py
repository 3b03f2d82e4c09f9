"""The best number of slots of hot requests for a load, and what it serves. Imports no torch."""

import math
from dataclasses import dataclass, replace

from hotset.cost.hot_set import (
    LEAST_GAIN,
    MOST_SLOTS,
    SLOT_STEP,
    TAIL_TOKENS,
    HotSetCost,
    HotStep,
    Room,
)
from hotset.cost.selection import Guesses


@dataclass(frozen=True)
class HotPlan:
    """The best number of slots for a load, and what it serves.

    Attributes:
        cost: of steps.
        room: in which all lies.
        slots: per hot request and layer.
        resident: the step without hot requests; None where not even one resident request fits.
        hot: the step with them.
        limit: what bounds its users: `HBM`, `host memory`, `users` or `TPOT`.
        break_even: requests that run or wait from which on some turn hot; None if none ever do.
    """

    cost: HotSetCost
    room: Room
    slots: int
    resident: HotStep | None
    hot: HotStep
    limit: str
    break_even: int | None

    @property
    def rows(self) -> Guesses:
        """Per hot request, layer and step."""
        return self.cost.rows(self.slots)

    @property
    def host_bytes(self) -> float:
        """What hot requests have in host memory."""
        return self.hot.num_hot * self.cost.cache.resident_bytes(self.cost.context)

    @property
    def pays(self) -> bool:
        """Whether requests turn hot."""
        return bool(self.hot.num_hot) and (self.gain is None or self.gain >= 1 + LEAST_GAIN)

    @property
    def gain(self) -> float | None:
        """Tokens/s with hot requests by those without; None where none is resident."""
        return self.hot.tokens_per_s / self.resident.tokens_per_s if self.resident else None


def plan_hot_set(
    cost: HotSetCost,
    room: Room,
    wanted: int,
    *,
    tpot_s: float | None = None,
    slots: int | None = None,
) -> HotPlan | None:
    """The slots with which `wanted` requests get most tokens per second; fewest of equal ones.

    None where no hot request fits or is smaller than a resident one, or none keeps `tpot_s`. With
    `slots` they are not solved for.
    """

    def rate(candidate: int) -> tuple[float, int]:
        step = cost.hot_step(wanted, room, candidate, tpot_s)
        return (step.tokens_per_s if step else 0.0, -candidate)

    solved = slots is None
    fewest = math.ceil(cost.cache.top_k / SLOT_STEP) * SLOT_STEP
    most = math.floor(cost.context / SLOT_STEP) * SLOT_STEP - TAIL_TOKENS - SLOT_STEP
    most = min(most, MOST_SLOTS)
    if most < (slots or fewest):
        return None
    if slots is None:
        coarse = 8 * SLOT_STEP
        near = max(range(fewest, most + 1, coarse), key=rate)
        around = range(max(fewest, near - coarse), min(most, near + coarse) + 1, SLOT_STEP)
        slots = max(around, key=rate)
    step = cost.hot_step(wanted, room, slots, tpot_s)
    if step is None:
        return None
    limit = _limit(cost, room, wanted, step, slots)
    if solved and tpot_s is not None and limit == "HBM":  # more slots, as more users were too slow
        free = plan_hot_set(cost, room, wanted)
        limit = limit if free is None or free.slots == slots else "TPOT"
    return HotPlan(
        cost=cost,
        room=room,
        slots=slots,
        resident=cost.resident_step(wanted, room),
        hot=step,
        limit=limit,
        break_even=_break_even(cost, room, slots, step.users),
    )


def _limit(cost: HotSetCost, room: Room, wanted: int, step: HotStep, slots: int) -> str:
    """What keeps a step from having more users."""
    if step.users == wanted:
        return "users"
    if step.users < cost.most_users(room, slots):
        return "TPOT"
    roomy = replace(room, host_bytes=wanted * cost.cache.resident_bytes(cost.context))
    return "HBM" if step.users >= cost.most_users(roomy, slots) else "host memory"


def _break_even(cost: HotSetCost, room: Room, slots: int, users: int) -> int | None:
    """The fewest requests, of at most `users`, of which some turn hot."""
    fit = cost.resident_users(room)
    return next(
        (n for n in range(fit + 1, users + 1) if cost.users_at_once(n, room, slots) > fit), None
    )
