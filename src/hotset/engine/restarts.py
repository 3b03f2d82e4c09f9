"""When an engine of several ranks starts again after one has failed. Imports no torch."""

from collections import deque

from hotset.clock import REAL_CLOCK, Clock

_DELAYS_S = (1.0, 2.0, 4.0)
_WITHIN_S = 600.0


class Restarts:
    """Allows 3 starts within 10 minutes, each after a longer wait."""

    def __init__(self, clock: Clock = REAL_CLOCK) -> None:
        self._clock = clock
        self._starts_s: deque[float] = deque(maxlen=len(_DELAYS_S))

    def next_delay_s(self) -> float | None:
        """How long to wait for the next start, which is counted; None: there is none."""
        now_s = self._clock.now()
        while self._starts_s and self._starts_s[0] < now_s - _WITHIN_S:
            self._starts_s.popleft()
        if len(self._starts_s) == len(_DELAYS_S):
            return None
        delay_s = _DELAYS_S[len(self._starts_s)]
        self._starts_s.append(now_s + delay_s)
        return delay_s
