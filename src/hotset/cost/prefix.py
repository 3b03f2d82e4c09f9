"""Fetch a prefix from a slower tier, compute it again, or both at once: the cheapest.

With `x` tokens computed and `cold_tokens - x` fetched, both at once, the prefix is ready at

    max(compute(x), fetch(cold_tokens - x)), where
    compute(x) = (queued_tokens + x) / prefill                      0 at x = 0
    fetch(y)   = (queued_bytes + y * bytes_per_token) / link        0 at y = 0

`compute` rises with x and `fetch` falls, so the best inner x is where they cross:

    x = ((queued_bytes + cold_tokens * bytes_per_token) / link - queued_tokens / prefill)
        / (bytes_per_token / link + 1 / prefill)

The two end points skip one queue altogether, so they are compared with the whole numbers on
both sides of the crossing. Equal times take the fewest computed tokens.

Computed tokens take time from other requests, and a fetch does not: while others run, the
whole prefix is fetched unless that takes longer than to compute the whole of it.

Prefill is taken as linear in tokens; that a later token costs more attention is for the caller
to put into `rates`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from hotset.cost.rates import Rates

Mode = Literal["auto", "fetch", "recompute"]


class Split(NamedTuple):
    """How a prefix that lies in slower tiers comes to the device.

    Attributes:
        computed_tokens: of its front; the rest is fetched meanwhile. 0 to fetch all.
        ready_s: until all of it is there.
    """

    computed_tokens: int
    ready_s: float


def split_prefix(
    rates: Rates,
    cold_tokens: int,
    tiers: Iterable[str],
    *,
    bytes_per_token: float,
    others_run: bool,
    queued_bytes: float = 0.0,
    queued_tokens: float = 0.0,
    mode: Mode = "auto",
) -> Split:
    """How many of `cold_tokens` to compute from the front while the rest is fetched, see above.

    Args:
        rates: of the model's prefill, and of the tiers.
        cold_tokens: leading tokens of a request that lie in slower tiers.
        tiers: the names of these tiers; the slowest one counts for all.
        bytes_per_token: KV bytes of one token, over all layers.
        others_run: whether other requests wait for the device's time.
        queued_bytes: already queued on the link ahead of this fetch.
        queued_tokens: already queued for prefill ahead of this prefix.
        mode: "fetch" fetches and "recompute" computes all, whatever that takes.

    Raises:
        ValueError: a rate or `bytes_per_token` is not positive, or another figure is negative
            or not finite.
    """
    link_bytes_per_s = min(rates.link_bytes_per_s[tier] for tier in tiers)
    prefill_tokens_per_s = rates.prefill_tokens_per_s
    _check(
        above_zero={
            "bytes_per_token": bytes_per_token,
            "link_bytes_per_s": link_bytes_per_s,
            "prefill_tokens_per_s": prefill_tokens_per_s,
        },
        others={
            "cold_tokens": cold_tokens,
            "queued_bytes": queued_bytes,
            "queued_tokens": queued_tokens,
        },
    )

    def compute_s(computed: int) -> float:
        return (queued_tokens + computed) / prefill_tokens_per_s if computed else 0.0

    def fetch_s(fetched: int) -> float:
        queued = queued_bytes + fetched * bytes_per_token
        return queued / link_bytes_per_s if fetched else 0.0

    def split(computed: int) -> Split:
        return Split(computed, max(compute_s(computed), fetch_s(cold_tokens - computed)))

    if mode != "auto":
        return split(0 if mode == "fetch" else cold_tokens)
    if others_run and fetch_s(cold_tokens) <= compute_s(cold_tokens):
        return split(0)
    lead_s = (queued_bytes + cold_tokens * bytes_per_token) / link_bytes_per_s
    lead_s -= queued_tokens / prefill_tokens_per_s
    crossing = lead_s / (bytes_per_token / link_bytes_per_s + 1 / prefill_tokens_per_s)
    inner = (min(max(f(crossing), 0), cold_tokens) for f in (math.floor, math.ceil))
    splits = map(split, sorted({0, *inner, cold_tokens}))
    return min(splits, key=lambda one: one.ready_s)


def _check(*, above_zero: dict[str, float], others: dict[str, float]) -> None:
    for name, value in above_zero.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected a finite number above 0")
    for name, value in others.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected 0 or a finite number above it")


class StatePlace(NamedTuple):
    """A place in a prefix where a state is known, so that a request can go on there.

    Attributes:
        num_tokens: before it.
        cold_tokens: of these, those whose KV is in slower tiers.
        is_cold: whether the state is.
        tiers: the names of these tiers.
    """

    num_tokens: int
    cold_tokens: int
    is_cold: bool
    tiers: set[str]


class PrefixPolicy:
    """`split_prefix` for the requests of one engine, or what its user chose in its place.

    Args:
        rates: of this machine.
        bytes_per_token: of KV.
        state_bytes: of a request beside its KV. A prefix with a state is fetched as a whole, up to
            a place where one was kept: none of it can be computed meanwhile.
        mode: "auto" is as said above.
    """

    def __init__(
        self,
        rates: Rates,
        *,
        bytes_per_token: int,
        state_bytes: int = 0,
        mode: Mode = "auto",
    ) -> None:
        self.rates = rates
        self.bytes_per_token = bytes_per_token
        self.state_bytes = state_bytes
        self.mode = mode

    def split(
        self, cold_tokens: int, tiers: set[str], *, queued_bytes: int, queued_tokens: int
    ) -> Split:
        """How `cold_tokens` found in `tiers` come to the device; queued tokens are of others."""
        return split_prefix(
            self.rates,
            cold_tokens,
            tiers,
            bytes_per_token=self.bytes_per_token,
            others_run=queued_tokens > 0,
            queued_bytes=queued_bytes,
            queued_tokens=queued_tokens,
            mode=self.mode,
        )

    def saved_s(self, num_tokens: int) -> float:
        """Seconds that `num_tokens` save at most that are found in a tier, as far as is known."""
        if self.mode != "auto":
            return math.inf if self.mode == "fetch" else 0.0
        rate = self.rates.prefill_tokens_per_s
        return num_tokens / rate if rate > 0 else math.inf

    def place_to_start(
        self, places: Sequence[StatePlace], *, queued_bytes: int, queued_tokens: int
    ) -> int:
        """The place from which a request is at its end soonest, as its index.

        Args:
            places: the deepest first, the place of no tokens last.
            queued_bytes: that come to the device before.
            queued_tokens: of other requests, which are computed meanwhile.
        """
        if self.mode == "fetch":
            return 0
        if self.mode == "recompute":
            return next(i for i, place in enumerate(places) if not place.tiers)
        queued_s = queued_tokens / self.rates.prefill_tokens_per_s

        def seconds(place: StatePlace) -> float:
            """Until the tokens before the deepest place are there."""
            num_bytes = place.cold_tokens * self.bytes_per_token + place.is_cold * self.state_bytes
            rates = (self.rates.link_bytes_per_s[tier] for tier in place.tiers)
            fetch_s = (queued_bytes + num_bytes) / min(rates) if place.tiers else 0.0
            left = places[0].num_tokens - place.num_tokens
            return max(fetch_s, queued_s) + left / self.rates.prefill_tokens_per_s

        return min(range(len(places)), key=lambda i: seconds(places[i]))

    def is_worth_state(self, num_tokens: int, tier: str) -> bool:
        """Whether a state `num_tokens` behind another is fetched sooner than these are computed."""
        if self.mode != "auto":
            return self.mode == "fetch"
        return self.fetch_s(num_tokens, tier) < num_tokens / self.rates.prefill_tokens_per_s

    def fetch_s(self, num_tokens: int, tier: str) -> float:
        """Seconds to fetch `num_tokens` and a state from `tier` when nothing else is fetched."""
        num_bytes = num_tokens * self.bytes_per_token + self.state_bytes
        return num_bytes / self.rates.link_bytes_per_s[tier]
