"""How many replicas a fleet needs: enough for the seconds of work that wait, and for what comes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from hotset.clock import REAL_CLOCK, Clock
from hotset.option_fields import Bounds, Group, option

_BUSY = 0.7  # of a replica's prefill rate, for what arrives; queues grow without bound towards 1
_COUNT = Bounds("1 or more", 1)
_FULL = 0.85  # of its KV blocks, so that decodes have room to grow


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica says of its work.

    Attributes:
        waiting_tokens: of prompts, yet to be computed.
        prefill_tokens_per_s: as measured.
        kv_share: of the KV blocks that requests may hold, those that are held.
    """

    waiting_tokens: float
    prefill_tokens_per_s: float
    kv_share: float

    @classmethod
    def of(cls, load: Mapping[str, float]) -> Self:
        """From the numbers of a replica's `Load`, by name."""
        usable = load["usable_blocks"]
        free = load["spare_blocks"] / usable if usable else 1.0
        return cls(
            load["queued_tokens"], load["prefill_tokens_per_s"], min(1.0, max(0.0, 1 - free))
        )

    @property
    def wait_s(self) -> float:
        """Seconds of prefill that wait."""
        return self.waiting_tokens / self.prefill_tokens_per_s


@dataclass(frozen=True, slots=True)
class ScalingOptions(Group):
    """Between how many replicas a fleet grows and shrinks, and when."""

    replicas: int = option(1, "Replicas of the engine, the fewest.", bounds=_COUNT)
    max_replicas: int | None = option(
        None, "Most replicas, for as long as work waits.", bounds=_COUNT, otherwise="--replicas"
    )
    wait_target_s: float = option(
        2.0,
        "Seconds of prefill that may wait on each replica before there is another one.",
        bounds=Bounds("above 0 seconds", 0, is_open=True),
    )
    start_s: float = option(
        60.0,
        "Seconds until a new replica serves, in which the work goes on growing.",
        bounds=Bounds("0 or more seconds", 0),
    )
    shrink_s: float = option(
        600.0,
        "Seconds for which one replica fewer would have done before it goes.",
        bounds=Bounds("0 or more seconds", 0),
    )

    @property
    def most(self) -> int:
        """Replicas at most."""
        return max(self.replicas, self.max_replicas or 0)


def replicas_needed(
    needs: Sequence[Need], arriving_tokens_per_s: float, growth_per_s: float, told: ScalingOptions
) -> int:
    """Replicas that the work of now needs, without regard to bounds; 0 without any work.

    Args:
        needs: of the replicas that serve.
        arriving_tokens_per_s: uncached prompt tokens that the fleet takes in, 60 s mean.
        growth_per_s: share by which these grow per second; below 0 counts as 0.
        told: `wait_target_s` and `start_s`.
    """
    if not needs:
        return 0
    rate = sum(one.prefill_tokens_per_s for one in needs) / len(needs)
    waiting = sum(one.wait_s for one in needs) / told.wait_target_s
    soon = arriving_tokens_per_s * (1 + told.start_s * max(0.0, growth_per_s))
    held = sum(one.kv_share for one in needs) / _FULL  # N times the mean share
    return max(math.ceil(waiting), math.ceil(soon / (_BUSY * rate)), math.ceil(held - 1e-9))


class Scaler:
    """Follows the need: up at once, down by one when that would have done for `shrink_s`.

    Attributes:
        target: replicas that there should be.
    """

    def __init__(self, told: ScalingOptions, *, clock: Clock = REAL_CLOCK) -> None:
        self._told = told
        self._clock = clock
        self.target = told.replicas
        self._spare_since_s: float | None = None

    def follow(self, needed: int) -> int:
        """Take note of what is needed now; returns the target."""
        now_s = self._clock.now()
        needed = min(max(needed, self._told.replicas), self._told.most)
        if needed >= self.target:
            self.target, self._spare_since_s = needed, None
        elif self._spare_since_s is None:
            self._spare_since_s = now_s
        elif now_s - self._spare_since_s >= self._told.shrink_s:
            self.target, self._spare_since_s = self.target - 1, now_s
        return self.target


class Arrivals:
    """Tokens that arrive per second: the mean of the last minute, and how it grows.

    Fed with the prompt tokens that each replica has computed or has waiting. Where less wait than
    was expected, or a replica starts again, its sum falls: then nothing has arrived.
    """

    _SPAN_S = 60.0

    def __init__(self, *, clock: Clock = REAL_CLOCK) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._came: list[tuple[float, float]] = []  # (when, tokens since the time before)
        self._start_s = clock.now()

    def count(self, totals: Mapping[str, float]) -> None:
        """Take note of these sums, by the replica's id."""
        came = sum(
            max(0.0, total - self._last.get(replica_id, total))
            for replica_id, total in totals.items()
        )
        self._last = dict(totals)
        now_s = self._clock.now()
        self._came = [one for one in self._came if one[0] > now_s - 2 * self._SPAN_S]
        self._came.append((now_s, came))

    @property
    def per_s(self) -> float:
        """Mean of the last minute; too little before there was one."""
        return self._mean(0.0)

    @property
    def growth_per_s(self) -> float:
        """Share by which a minute's mean grows per second; 0 until there are two minutes."""
        before = self._mean(self._SPAN_S)
        if self._clock.now() - self._start_s < 2 * self._SPAN_S or before <= 0:
            return 0.0
        return (self.per_s / before - 1) / self._SPAN_S

    def _mean(self, ago_s: float) -> float:
        end_s = self._clock.now() - ago_s
        tokens = sum(came for at_s, came in self._came if end_s - self._SPAN_S < at_s <= end_s)
        return tokens / self._SPAN_S
