"""Limits of keys over several fronts: a ledger has them, and gives each front what it asks for.

A front asks each second for what a key may use in the next one, and gives back what it does not
need. Where the ledger does not answer, each of M fronts goes on with 1/M of each limit, beside what
is left of its lease; the ledger then gives the other fronts their parts only. So a key is never
served more than its limit plus one lease. All fronts together start with the limit, and the ledger
with nothing, so that a ledger that starts again gives nothing twice.
"""

import math
from collections.abc import Mapping

import msgspec

from hotset.clock import REAL_CLOCK, Clock
from hotset.errors import RequestError
from hotset.fleet.allowance import Bucket, KeyLimits, KeyShare, Kind

ASK_EVERY_S = 1.0
# A front that has not asked for so long is taken to go on alone.
SILENT_S = 3.0
# After that it still has requests of its lease open, for so long.
_PLACES_KEPT_S = 60.0
_AHEAD = 2  # how many times what it used in the last second a front may use


class RateAsk(msgspec.Struct, frozen=True):
    """Of a rate: what a front gives back, below 0 what it has overdrawn, and what it wants."""

    back: float = 0.0
    want: int = 0


class KeyAsk(msgspec.Struct, frozen=True):
    """What a front asks for one key; `held` places are its own until it says otherwise."""

    rates: dict[Kind, RateAsk] = {}
    held: int = 0
    want: int = 0


class Ask(msgspec.Struct, frozen=True):
    """What a front asks, by the name of a key.

    Attributes:
        is_leased: False where it goes on alone, and only asks whether the desk is there: a front
            whose answers are lost must not count as one that lives by them.
    """

    rank: int
    num_fronts: int
    is_leased: bool
    keys: dict[str, KeyAsk] = {}


class RateGrant(msgspec.Struct, frozen=True):
    """What a front gets of a rate; where it got nothing, when there may be more."""

    amount: int = 0
    wait_s: float = 0.0


class KeyGrant(msgspec.Struct, frozen=True):
    """What a front gets for one key, on top of what it has."""

    rates: dict[Kind, RateGrant] = {}
    places: int = 0


class Answer(msgspec.Struct, frozen=True):
    """The answer to an ask."""

    keys: dict[str, KeyGrant] = {}


class FrontLeases:
    """One front's side, for all keys: what it asks and what it makes of the answer.

    One thread uses it, with one ask on its way at a time. After an `ask` comes `take` or `lost`.

    Args:
        shares: of each key, by name.
        rank: of this front, from 0.
        num_fronts: as all fronts and the desk are told.
    """

    def __init__(self, shares: Mapping[str, KeyShare], *, rank: int, num_fronts: int) -> None:
        self._shares = {name: share for name, share in shares.items() if share.has_limits}
        self._rank, self._num_fronts = rank, num_fronts
        self._debts: list[tuple[Bucket, float]] = []  # of the ask on its way
        self.is_leased = False

    def ask(self) -> Ask:
        """What to ask now. What is given back is gone from here; debts are, until `lost`."""
        self._debts = []
        if self.is_leased:
            asks = ((name, self._ask_for(share)) for name, share in self._shares.items())
            keys = {name: ask for name, ask in asks if ask is not None}
        else:
            keys = {
                name: KeyAsk(held=max(share.places, share.num_open))
                for name, share in self._shares.items()
                if share.places is not None
            }
        return Ask(self._rank, self._num_fronts, self.is_leased, keys)

    def take(self, answer: Answer) -> None:
        """The desk has answered: what it gave may be used."""
        self._debts = []
        self.is_leased = True
        for name, share in self._shares.items():
            share.lease()
            grant = answer.keys.get(name)
            if grant is None:
                continue
            if share.places is not None:
                share.places += grant.places
            for kind, given in grant.rates.items():
                share.buckets[kind].level += given.amount
                share.wait(kind, given.wait_s)

    def lost(self) -> None:
        """The desk has not answered: this front goes on with its own part."""
        for bucket, debt in self._debts:
            bucket.level += debt
        self._debts = []
        self.is_leased = False
        for share in self._shares.values():
            share.own()

    def _ask_for(self, share: KeyShare) -> KeyAsk | None:
        used, share.used = share.used, dict.fromkeys(share.used, 0)
        is_idle = not any(used.values())
        rates = {}
        for kind, bucket in share.buckets.items():
            # One at least, as a request begins where there is one of everything.
            target = 0 if is_idle else max(1, _AHEAD * used[kind])
            surplus = bucket.level - target
            back = surplus if surplus > 0 else min(0.0, bucket.level)
            bucket.level -= back
            if back < 0:
                self._debts.append((bucket, back))
            want = max(0, math.ceil(target - bucket.level))
            if back or want:
                rates[kind] = RateAsk(back, want)
        had, held, want = share.places, 0, 0
        if had is not None:
            target = share.num_open + (0 if is_idle else max(1, _AHEAD * used[Kind.PLACES]))
            share.places = held = min(had, target)
            want = target - held
        return KeyAsk(rates, held, want) if rates or want or held != (had or 0) else None

    def wish(self, share: KeyShare) -> None:
        """A request waits for this key: ask for one at least."""
        share.used[Kind.PLACES] += 1


class _Account:
    """What the ledger has of one key: nothing at first, as each front starts with its part."""

    def __init__(self, limits: KeyLimits, now_s: float) -> None:
        self.limits = limits
        self.held: dict[int, int] = {}  # places by front, as each said or was given last
        self.pools = {
            kind: Bucket(limit, part=0.0, level=0.0, now_s=now_s)
            for kind, limit in limits.per_minute.items()
        }

    def set_part(self, part: float, now_s: float) -> None:
        for pool in self.pools.values():
            pool.set_part(part, now_s)
            pool.cut()

    def answer(
        self, rank: int, ask: KeyAsk, *, kept: int, num_heard: int, now_s: float
    ) -> KeyGrant:
        """Give what there is, `kept` places beside those that fronts hold being taken."""
        rates = {}
        for kind, wanted in ask.rates.items():
            if (pool := self.pools.get(kind)) is None:
                continue
            pool.refill(now_s)
            pool.level += wanted.back
            pool.cut()
            amount = _fair_part(wanted.want, math.floor(pool.level), num_heard)
            pool.level -= amount
            rates[kind] = RateGrant(amount, 0.0 if amount else min(60.0, pool.wait_s()))
        places = 0
        if self.limits.max_concurrent is not None:
            self.held[rank] = ask.held
            free = self.limits.max_concurrent - sum(self.held.values()) - kept
            places = _fair_part(ask.want, free, num_heard)
            self.held[rank] += places
        return KeyGrant(rates, places)


class Ledger:
    """The desk's side: the limits of all keys, and what fronts hold of them. One thread uses it.

    Args:
        limits: by the name of a key.
        num_fronts: as all fronts are told.
    """

    def __init__(
        self, limits: Mapping[str, KeyLimits], *, num_fronts: int, clock: Clock = REAL_CLOCK
    ) -> None:
        self._clock = clock
        self._num_fronts = num_fronts
        now_s = clock.now()
        self._accounts = {name: _Account(one, now_s) for name, one in limits.items()}
        # Each front is in one of the two: those that live by leases, with the time of their last
        # ask, and those that go on alone, with the time since when.
        self._heard_s: dict[int, float] = {}
        self._alone_s = dict.fromkeys(range(num_fronts), now_s)

    def answer(self, ask: Ask) -> Answer:
        """Give a front what there is of what it asks for.

        Raises:
            RequestError: it was started for other fronts or other keys; nothing has changed.
        """
        if ask.num_fronts != self._num_fronts or not 0 <= ask.rank < self._num_fronts:
            raise RequestError(
                f"front {ask.rank} was started as one of {ask.num_fronts} fronts, the desk for "
                f"{self._num_fronts}; start all with the same number"
            )
        if unknown := ask.keys.keys() - self._accounts.keys():
            raise RequestError(
                f"front {ask.rank} has a key {min(unknown)!r} that the desk does not have; start "
                "all with the same keys"
            )
        now_s = self._clock.now()
        self._look_for_silent(now_s)
        if not ask.is_leased:
            self._leave(ask.rank, now_s)
            for name, one in ask.keys.items():
                self._accounts[name].held[ask.rank] = one.held
            return Answer()
        is_new = self._alone_s.pop(ask.rank, None) is not None
        self._heard_s[ask.rank] = now_s
        if is_new:
            self._set_part(now_s)
        num_heard = len(self._heard_s)
        return Answer(
            {
                name: self._accounts[name].answer(
                    ask.rank,
                    one,
                    kept=self._kept_places(self._accounts[name], now_s),
                    num_heard=num_heard,
                    now_s=now_s,
                )
                for name, one in ask.keys.items()
            }
        )

    def _look_for_silent(self, now_s: float) -> None:
        """Take note, as of when it was, that fronts have fallen silent."""
        ends = sorted((heard_s + SILENT_S, rank) for rank, heard_s in self._heard_s.items())
        for end_s, rank in ends:
            if end_s <= now_s:
                self._leave(rank, end_s)

    def _kept_places(self, account: _Account, now_s: float) -> int:
        """Places that fronts that go on alone may have, beside what they said they hold."""
        kept = 0
        for rank, since_s in self._alone_s.items():
            share = account.limits.places_of(rank, self._num_fronts) or 0
            held = account.held.get(rank, 0)
            is_over = now_s - since_s > _PLACES_KEPT_S
            kept += share - held if is_over else max(0, share - held)
        return kept

    def _leave(self, rank: int, now_s: float) -> None:
        self._alone_s[rank] = now_s
        if self._heard_s.pop(rank, None) is not None:
            self._set_part(now_s)

    def _set_part(self, now_s: float) -> None:
        for account in self._accounts.values():
            account.set_part(len(self._heard_s) / self._num_fronts, now_s)


def _fair_part(want: int, free: int, num_heard: int) -> int:
    """So much of what is free that other fronts find some too."""
    return max(0, min(want, max(min(1, free), free // num_heard)))
