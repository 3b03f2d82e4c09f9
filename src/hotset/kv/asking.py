"""Requests that are queued while tiers are still to say what they have of them."""

from collections import deque
from collections.abc import Callable

from hotset.memory.tier import PATIENCE
from hotset.memory.tiers import TierStack
from hotset.sequence import Request, RequestStatus


class Asking:
    """Asks tiers as soon as a request is queued, and waits so that one step lets in all of them.

    A request that is let in a step later than those that came with it costs one more step.

    Args:
        tiers: below the device; None where there are none.
        is_open: looks up a request; whether a tier cannot say yet what it has.
    """

    def __init__(self, tiers: TierStack | None, is_open: Callable[[Request], bool]) -> None:
        self._tiers = tiers if tiers is not None and tiers.may_think else None
        self._is_open = is_open
        self._open: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Have tiers begin to say what they have of a request."""
        if self._tiers is not None and self._is_open(request):
            self._open.append(request)

    def wait(self) -> None:
        """Block until all is said, once for all requests that were added since the last call.

        For 2 % at most of the time that it takes to compute the longest of them (`PATIENCE`): all
        that runs waits, too.
        """
        if self._tiers is None or not self._open:
            return
        rate = self._tiers.rates.prefill_tokens_per_s
        if rate > 0:
            most_s = PATIENCE * max(one.num_tokens for one in self._open) / rate
            self._tiers.await_answers(self._are_left, most_s)
        self._open.clear()

    def _are_left(self) -> bool:
        while self._open:
            first = self._open[0]
            if first.status is RequestStatus.WAITING and self._is_open(first):
                return True
            self._open.popleft()
        return False
