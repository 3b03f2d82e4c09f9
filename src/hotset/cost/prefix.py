"""Fetch or recompute, decided by arithmetic over live rates."""

from dataclasses import dataclass, field
from typing import Literal

from hotset.cost.step_time import split_prefix

_SMOOTHING = 0.2  # weight of the newest observation in a running mean


@dataclass(slots=True)
class Rates:
    """What the machine does now: measured at start, then followed while it runs.

    Attributes:
        prefill_tokens_per_s: tokens of prompt the model computes.
        link_bytes_per_s: by tier, how fast its payloads reach the device.
        link_latency_s: by tier, from asking for one payload to having it, less its bytes.
    """

    prefill_tokens_per_s: float
    link_bytes_per_s: dict[str, float]
    link_latency_s: dict[str, float] = field(default_factory=dict)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Follow the prefill rate with a step that computed `num_tokens`."""
        observed = num_tokens / max(seconds, 1e-9)
        self.prefill_tokens_per_s += _SMOOTHING * (observed - self.prefill_tokens_per_s)

    def observe_link(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Follow the rate of a tier with a transfer of `num_bytes`."""
        observed = num_bytes / max(seconds, 1e-9)
        old = self.link_bytes_per_s.setdefault(tier, observed)
        self.link_bytes_per_s[tier] = old + _SMOOTHING * (observed - old)


class PrefixPolicy:
    """Chooses how much of a prefix in a colder tier is computed and how much is fetched."""

    def __init__(
        self,
        rates: Rates,
        *,
        bytes_per_token: int,
        mode: Literal["auto", "fetch", "recompute"] = "auto",
    ) -> None:
        self.rates = rates
        self.bytes_per_token = bytes_per_token
        self.mode = mode

    def tokens_to_compute(
        self, cold_tokens: int, tiers: set[str], *, queued_bytes: int, queued_tokens: int
    ) -> int:
        """Of `cold_tokens` found in `tiers`, how many to compute from the front.

        The rest is fetched from the back meanwhile (0: fetch all). The slowest of the tiers
        counts for all, and what is queued before on the link and in the model counts too.

        While others run, tokens that are computed take time from them, and a fetch does not: then
        it is all by fetch unless that takes longer than to compute it all.
        """
        if self.mode == "fetch":
            return 0
        if self.mode == "recompute":
            return cold_tokens
        rates = self.rates
        slowest = min(tiers, key=lambda tier: rates.link_bytes_per_s[tier])
        link_bytes_per_s = rates.link_bytes_per_s[slowest]
        link_latency_s = rates.link_latency_s.get(slowest, 0.0)
        if queued_tokens:
            fetch_s = (queued_bytes + cold_tokens * self.bytes_per_token) / link_bytes_per_s
            compute_s = (queued_tokens + cold_tokens) / rates.prefill_tokens_per_s
            if link_latency_s + fetch_s <= compute_s:
                return 0
        return split_prefix(
            cold_tokens,
            bytes_per_token=self.bytes_per_token,
            link_bytes_per_s=link_bytes_per_s,
            link_latency_s=link_latency_s,
            link_queue_bytes=queued_bytes,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            prefill_queue_tokens=queued_tokens,
        )

    def fetch_s(self, num_tokens: int) -> float:
        """Time to fetch `num_tokens` from host memory when nothing else is fetched."""
        return num_tokens * self.bytes_per_token / self.rates.link_bytes_per_s["host"]
