"""Requests that run on the same ranks: who runs next, and their blocks. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.engine.scheduler import Scheduler
from hotset.kv.cache import KVCache
from hotset.sequence import Request

if TYPE_CHECKING:
    from hotset.memory.tiers import TierStack


@dataclass(frozen=True, slots=True)
class Lane:
    """A part of the requests, with blocks of its own: no other lane finds or writes them.

    With data-parallel attention each rank has one. Otherwise an engine has one lane.

    Attributes:
        scheduler: of its requests.
        tiers: below the device's KV; None where there are none.
    """

    scheduler: Scheduler
    tiers: "TierStack | None"

    @property
    def kv(self) -> KVCache:
        """The blocks of its requests."""
        return self.scheduler.kv


def choose_lane(lanes: Sequence[Lane], request: Request) -> int:
    """The number of the lane that a request is to run in.

    That is where tokens are the fewest, of all requests there and of this one without those that
    the lane has: a prefix is as good a reason as that many tokens of others less.
    """
    if len(lanes) == 1:
        return 0
    loads = [lane.scheduler.num_tokens - lane.kv.num_found_tokens(request) for lane in lanes]
    return loads.index(min(loads))
