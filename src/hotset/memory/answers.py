"""What the tiers below the device say of keys, and for how long they may. Imports no torch."""

from collections.abc import Sequence
from math import inf

from hotset.clock import Clock
from hotset.memory.residency import Residency, State
from hotset.memory.slower_tier import SlowerTier
from hotset.memory.tier import Answer, Found, TierInfo

_MOST_S = 0.25  # that a key is PENDING; after that, it counts as not there
_TURN_S = 0.001  # for so long each of several tiers is waited for
_MISS = Found(Answer.MISS)
_PENDING = Found(Answer.PENDING)


class Answers:
    """Asks host memory, then slower tiers; each key is waited for a bounded time.

    Args:
        host: which payload is in which host slot.
        infos: a row for each tier, fastest first: host memory, then `slower`.
        slower: the other tiers, fastest first.
        clock: what that time is measured by.
    """

    def __init__(
        self,
        host: Residency,
        infos: Sequence[TierInfo],
        slower: Sequence[SlowerTier],
        clock: Clock,
    ) -> None:
        self._host, self._infos, self._slower, self._clock = host, infos, slower, clock
        self._since_s: dict[bytes, float] = {}  # when what is not answered was first asked for
        self._thinking: set[SlowerTier] = set()  # that said PENDING, and until when they may
        self._until_s = 0.0

    @property
    def any_left(self) -> bool:
        """Whether a key may still be waited for."""
        if not self._since_s:
            return False
        return self._clock.now() - max(self._since_s.values()) < _MOST_S

    @property
    def left_s(self) -> float:
        """For how long what was PENDING since `begin_round` still is; infinite where none was."""
        if not self._thinking:
            return inf
        return max(0.0, self._until_s - self._clock.now())

    def begin_round(self) -> None:
        """Forget which tiers said PENDING: what they are asked from here on counts."""
        self._thinking.clear()
        self._until_s = 0.0

    def lookup(self, keys: Sequence[bytes], *, may_ask: bool, saved_s: float) -> list[Found]:
        """See `TierStack.lookup`."""
        found = [self._in_host(key) for key in keys]
        most_s: dict[int, float] = {}
        for info, slower in zip(self._infos[1:], self._slower, strict=True):
            asked = [i for i, one in enumerate(found) if one is None or one is _PENDING]
            if not asked:
                break
            answers = slower.tier.lookup([keys[i] for i in asked], may_ask=may_ask)
            for i, answer in zip(asked, answers, strict=True):
                if answer is Answer.HIT:
                    found[i] = Found(Answer.HIT, info)
                elif answer is Answer.PENDING:
                    found[i] = _PENDING
                    assert info.patience is not None, "a tier without patience is to answer"
                    most_s[i] = max(most_s.get(i, 0.0), info.patience * saved_s)
                    self._thinking.add(slower)
        for i, one in enumerate(found):
            if one is not _PENDING:
                self._since_s.pop(keys[i], None)
            elif not self._may_wait(keys[i], most_s[i]):
                found[i] = _MISS
        return [one or _MISS for one in found]

    def _in_host(self, key: bytes) -> Found | None:
        payload = self._host.get(key)
        if payload is None:
            return None
        if payload.state is State.LATE or payload.is_dropped:
            return _MISS
        is_read = payload.state is State.READING
        return Found(Answer.HIT, self._infos[payload.source if is_read else 0])

    def _may_wait(self, key: bytes, most_s: float) -> bool:
        """Whether a key that is not answered for is waited for, from the first call on."""
        now_s = self._clock.now()
        if key not in self._since_s:
            self._forget_old(now_s)
        until_s = self._since_s.setdefault(key, now_s) + min(_MOST_S, most_s)
        self._until_s = max(self._until_s, until_s)
        return now_s < until_s

    def _forget_old(self, now_s: float) -> None:
        """Forget keys that have been pending for so long that they are asked for anew."""
        self._since_s = {
            key: since_s for key, since_s in self._since_s.items() if now_s - since_s < 10 * _MOST_S
        }

    def is_thinking(self, slower: SlowerTier) -> bool:
        """Whether a tier has said PENDING since `begin_round`."""
        return slower in self._thinking

    def wait(self, timeout_s: float) -> None:
        """Block until a tier that said PENDING since `begin_round` may know, or for `timeout_s`."""
        wait_for_one(list(self._thinking), timeout_s)


def wait_for_one(slower: Sequence[SlowerTier], timeout_s: float) -> None:
    """Block until something can be polled of these, each in turn, or `timeout_s` has passed."""
    for one in slower:
        one.tier.wait(timeout_s if len(slower) == 1 else min(_TURN_S, timeout_s))
