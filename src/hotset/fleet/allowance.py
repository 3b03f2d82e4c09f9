"""What a key may use in this process: all of its limits, or a front's share of them."""

from dataclasses import dataclass
from enum import StrEnum

from hotset.clock import REAL_CLOCK, Clock

_MINUTE_S = 60.0
_WHOLE = 1 - 1e-9  # one, but for rounding


class Kind(StrEnum):
    """What a limit counts, as refusals name it."""

    PLACES = "places"
    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use, over all fronts together; None is no limit."""

    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def per_minute(self) -> dict[Kind, int]:
        """Of the rates that have a limit."""
        limits = {
            Kind.REQUESTS: self.requests_per_minute,
            Kind.TOKENS: self.tokens_per_minute,
        }
        return {kind: limit for kind, limit in limits.items() if limit is not None}

    def places_of(self, rank: int, num_fronts: int) -> int | None:
        """The places of one front of several: all of them together have as many as one alone."""
        if self.max_concurrent is None:
            return None
        return self.max_concurrent // num_fronts + (rank < self.max_concurrent % num_fronts)


NO_LIMITS = KeyLimits()


class Bucket:
    """An allowance that refills steadily, up to a minute's worth; it may be overdrawn.

    Args:
        per_minute: of the limit.
        part: of the limit that refills here.
        level: what there is at first; None is all that fits.

    Attributes:
        level: as of the last `refill`; below 0 where it was overdrawn.
    """

    def __init__(
        self, per_minute: int, *, part: float = 1.0, level: float | None = None, now_s: float
    ) -> None:
        self._per_minute = per_minute
        self._part = part
        self.level = self.most if level is None else level
        self._at_s = now_s

    @property
    def most(self) -> float:
        """What refilling goes up to: one at least, or a small limit would never serve anyone."""
        return max(1.0, self._per_minute * self._part) if self._part else 0.0

    def refill(self, now_s: float) -> None:
        """Add what has come since the last call. What is above `most` stays."""
        passed_s, self._at_s = max(0.0, now_s - self._at_s), max(self._at_s, now_s)
        come = passed_s * self._per_minute * self._part / _MINUTE_S
        self.level = max(self.level, min(self.most, self.level + come))

    def set_part(self, part: float, now_s: float) -> None:
        """Let another part of the limit refill from now on."""
        self.refill(now_s)
        self._part = part

    def cut(self) -> None:
        """Drop what is above `most`."""
        self.level = min(self.level, self.most)

    def wait_s(self) -> float:
        """Seconds until there is one; 0 is now, infinity never: nothing refills here."""
        if self.level >= _WHOLE:
            return 0.0
        if not self._part:
            return float("inf")
        return (1 - self.level) * _MINUTE_S / (self._per_minute * self._part)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request cannot begin now, and when it may."""

    kind: Kind
    wait_s: float


class KeyShare:
    """What one process may use of one key's limits; one thread uses it. It is in one state.

    own    -- its part of each limit refills here; the whole limit where there is one front
    leased -- the desk gives what is used, and nothing refills here

    Attributes:
        num_open: requests that hold a place.
        places: most that may; None is no limit.
        buckets: of the rates that have a limit.
        used: of each rate since the last ask.
    """

    def __init__(
        self,
        limits: KeyLimits,
        *,
        rank: int = 0,
        num_fronts: int = 1,
        clock: Clock = REAL_CLOCK,
    ) -> None:
        self._limits = limits
        self._rank, self._num_fronts = rank, num_fronts
        self._clock = clock
        self.num_open = 0
        self.places = limits.places_of(rank, num_fronts)
        now_s = clock.now()
        self.buckets = {
            kind: Bucket(limit, part=1 / num_fronts, now_s=now_s)
            for kind, limit in limits.per_minute.items()
        }
        self.used = {Kind.PLACES: 0, Kind.REQUESTS: 0, Kind.TOKENS: 0}
        self.is_leased = False
        self._wait_s: dict[Kind, float] = {}  # as the desk said, where it gave nothing

    @property
    def has_limits(self) -> bool:
        """Whether a request can be refused here."""
        return self._limits != NO_LIMITS

    def refusal(self) -> Refusal | None:
        """Why no request may begin now; None where one may."""
        if self.places is not None and self.num_open >= self.places:
            return Refusal(Kind.PLACES, 1.0)
        now_s = self._clock.now()
        for kind, bucket in self.buckets.items():
            bucket.refill(now_s)
            if wait_s := bucket.wait_s():
                return Refusal(kind, self._wait_s.get(kind, 1.0) if self.is_leased else wait_s)
        return None

    def open(self) -> None:
        """Begin a request: it takes a place and one of the requests. `refusal` said None."""
        self.num_open += 1
        self.used[Kind.PLACES] += 1
        self._take(Kind.REQUESTS, 1)

    def close(self) -> None:
        """End a request."""
        self.num_open -= 1

    def charge(self, num_tokens: int) -> None:
        """Count the tokens of a request that ends; they may be more than are left."""
        self._take(Kind.TOKENS, num_tokens)

    def _take(self, kind: Kind, amount: int) -> None:
        self.used[kind] += amount
        if (bucket := self.buckets.get(kind)) is not None:
            bucket.level -= amount

    def lease(self) -> None:
        """From now on the desk gives; what there is stays."""
        if self.is_leased:
            return
        self.is_leased = True
        for bucket in self.buckets.values():
            bucket.set_part(0.0, self._clock.now())
        if self.places is not None:  # as the desk was told
            self.places = max(self.places, self.num_open)

    def own(self) -> None:
        """From now on the part refills here; what is left of the lease stays."""
        if not self.is_leased:
            return
        self.is_leased = False
        self._wait_s.clear()
        for bucket in self.buckets.values():
            bucket.set_part(1 / self._num_fronts, self._clock.now())
        self.places = self._limits.places_of(self._rank, self._num_fronts)

    def wait(self, kind: Kind, wait_s: float) -> None:
        """Note what the desk said of when there is more."""
        self._wait_s[kind] = wait_s
