"""How long requests wait and how fast their tokens come: plain data, fed by the engine thread.

Imports no torch.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


def _bounds(numbers: str) -> tuple[float, ...]:
    return tuple(map(float, numbers.split()))


# Buckets are those of vLLM's metrics of the same names, so that dashboards carry over.
_TTFT_S = _bounds(
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
)
_ITL_S = _bounds("0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
_REQUEST_S = _bounds("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

_NUM_RECENT = 4096


class Histogram:
    """Counts by bucket since the start, and the latest values for exact percentiles.

    One thread observes; others may read meanwhile.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # the last is of values above all bounds
        self.sum = 0.0
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)

    def observe(self, value: float) -> None:
        """Take in one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self._recent.append(value)

    def percentiles(self, *shares: float) -> list[float | None]:
        """The values below which each share (0 to 1) of the latest ones lies; None: no values."""
        values = sorted(self._recent)
        if not values:
            return [None] * len(shares)
        return [values[max(0, math.ceil(share * len(values)) - 1)] for share in shares]


@dataclass(slots=True)
class Latencies:
    """Distributions over all requests since the start. Seconds, unless the name says tokens.

    Attributes:
        ttft: from submitting a request to its first output.
        itl: gaps between the outputs of one sequence, pooled.
        tpot: (end - first output) / (output tokens - 1), one value per request.
        queue: from submitting a request to the first step that it is part of.
        e2e: from submitting a request to its end; of requests that ended well, as `tpot`.
    """

    ttft: Histogram = field(default_factory=lambda: Histogram(_TTFT_S))
    itl: Histogram = field(default_factory=lambda: Histogram(_ITL_S))
    tpot: Histogram = field(default_factory=lambda: Histogram(_ITL_S))
    queue: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    e2e: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    output_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))


class RequestClock:
    """The times of one request; tells `Latencies` about them."""

    __slots__ = ("_first_s", "_last_s", "_latencies", "_num_tokens", "_submitted_s", "is_queued")

    def __init__(self, latencies: Latencies, now_s: float) -> None:
        self._latencies = latencies
        self._submitted_s = now_s
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}  # by output index
        self._num_tokens = 0
        self.is_queued = True

    def start(self, now_s: float) -> None:
        """The request is part of a step for the first time."""
        if self.is_queued:
            self.is_queued = False
            self._latencies.queue.observe(now_s - self._submitted_s)

    def output(self, index: int, num_tokens: int, now_s: float) -> None:
        """Tokens of one of the request's outputs have come."""
        if num_tokens == 0:
            return
        self._num_tokens += num_tokens
        if self._first_s is None:
            self._first_s = now_s
            self._latencies.ttft.observe(now_s - self._submitted_s)
        elif index in self._last_s:
            self._latencies.itl.observe(now_s - self._last_s[index])
        self._last_s[index] = now_s

    def end(self, prompt_tokens: int, now_s: float) -> None:
        """The request has ended well."""
        self._latencies.e2e.observe(now_s - self._submitted_s)
        self._latencies.prompt_tokens.observe(prompt_tokens)
        self._latencies.output_tokens.observe(self._num_tokens)
        tokens_each = self._num_tokens / max(1, len(self._last_s))
        if self._first_s is not None and tokens_each > 1:
            self._latencies.tpot.observe((now_s - self._first_s) / (tokens_each - 1))
