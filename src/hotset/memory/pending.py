"""How long a tier may leave it open whether it has a payload. Imports no torch."""

from hotset.clock import Clock

_MOST_S = 0.25  # after that, a key counts as not there


class PendingKeys:
    """Keys that a tier has not answered for yet, and since when: each is waited for a bounded time.

    Args:
        clock: what that time is measured by.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s: dict[bytes, float] = {}

    @property
    def any_left(self) -> bool:
        """Whether a key may still be waited for."""
        if not self._since_s:
            return False
        return self._clock.now() - max(self._since_s.values()) < _MOST_S

    def may_wait(self, key: bytes) -> bool:
        """Whether a key that is not answered for is waited for, from the first call on."""
        now_s = self._clock.now()
        if key not in self._since_s:
            self._forget_old(now_s)
        return now_s - self._since_s.setdefault(key, now_s) < _MOST_S

    def end(self, key: bytes) -> None:
        """A key has its answer."""
        self._since_s.pop(key, None)

    def _forget_old(self, now_s: float) -> None:
        """Forget keys that have been pending for so long that they are asked for anew."""
        self._since_s = {
            key: since_s for key, since_s in self._since_s.items() if now_s - since_s < 10 * _MOST_S
        }
