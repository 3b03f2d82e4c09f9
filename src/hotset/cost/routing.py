"""Which experts a batch reaches: uniform routing, or a histogram measured on real traffic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist, fmean

from hotset.cost.json_files import read_json
from hotset.errors import PlanError


@dataclass(frozen=True)
class Routing:
    """Share of the routed tokens each expert gets; empty for uniform routing.

    Attributes:
        shares: one for each expert, sum 1.
    """

    shares: tuple[float, ...] = ()

    def check(self, num_experts: int) -> None:
        """Raise PlanError unless the histogram is for `num_experts` experts."""
        if self.shares and len(self.shares) != num_experts:
            raise PlanError(
                f"the expert histogram has {len(self.shares)} counts and the model "
                f"{num_experts} experts a layer"
            )

    def distinct(self, num_experts: int, top_k: int, tokens: float) -> float:
        """Experts of a layer that `tokens` tokens reach, in expectation.

        Uniform: E (1 - (1 - k/E)^B). Measured: each expert with its own chance, top_k times its
        share and at most 1.
        """
        if not self.shares:
            return num_experts * reach(top_k / num_experts, tokens)
        return sum(reach(top_k * share, tokens) for share in self.shares)

    def distinct_on_rank(self, num_experts: int, top_k: int, tokens: float, ranks: int) -> float:
        """Expert slots that `tokens` tokens reach on the busiest of `ranks` ranks.

        Experts lie in order, as many on each rank; where they do not divide, spare slots hold
        copies, which counts them as reached like the others. Uniform routing reaches more on one
        rank than on another by chance: the largest of `ranks` normal variables whose sum is fixed.
        """
        slots = math.ceil(num_experts / ranks)
        if not self.shares:
            share = reach(top_k / num_experts, tokens)
            spread = math.sqrt(slots * share * (1 - share))
            # Blom's value for the largest of normal variables; for two it is exact.
            largest = (
                math.sqrt(1 / math.pi)
                if ranks == 2
                else NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
            )
            return min(slots, slots * share + spread * largest)
        reached = [reach(top_k * share, tokens) for share in self.shares]
        return max(sum(reached[i : i + slots]) for i in range(0, num_experts, slots))

    def imbalance(self, num_experts: int, ranks: int) -> float:
        """Load of the busiest rank over the mean one, experts in order and none moved."""
        if not self.shares or ranks == 1:
            return 1.0
        slots = math.ceil(num_experts / ranks)
        busiest = max(sum(self.shares[i : i + slots]) for i in range(0, num_experts, slots))
        return max(1.0, busiest * math.ceil(num_experts / slots))


def reach(chance: float, tokens: float) -> float:
    """Chance that at least one of `tokens` tokens picks an expert each picks with `chance`."""
    return 1.0 - math.pow(1.0 - min(1.0, chance), tokens)


def row_scales(num_experts: int, skew: float) -> list[float]:
    """Factors of a router's rows: the quantiles of a log-normal distribution, smallest first.

    Quantiles and not draws, so that every layer is skewed alike, whatever its seed.
    """
    normal = NormalDist()
    ranks = ((expert + 0.5) / num_experts for expert in range(num_experts))
    return [math.exp(skew * normal.inv_cdf(rank)) for rank in ranks]


def skewed_shares(num_experts: int, top_k: int, skew: float) -> tuple[float, ...]:
    """Shares of the routed tokens where a router's rows are scaled by `row_scales`, sum 1.

    Logits are taken as normal and independent, each with its row's factor as standard deviation.
    An expert is chosen where its logit is above the level that `top_k` logits exceed on average.
    The result does not depend on the scale of the logits.
    """
    normal, scales = NormalDist(), row_scales(num_experts, skew)

    def chances(level: float) -> list[float]:
        return [normal.cdf(-level / scale) for scale in scales]

    low, high = -100 * scales[-1], 100 * scales[-1]
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(chances(level)) > top_k else (low, level)
    found = chances(low)
    return tuple(chance / sum(found) for chance in found)


@dataclass(frozen=True)
class Skew:
    """How unevenly experts are used.

    Attributes:
        max_over_mean: load of the busiest expert over the mean load, mean over layers.
        top_quarter: share of the routed tokens that go to the busiest quarter of a layer's experts.
        for_90_percent: share of a layer's experts, busiest first, that get 90 % of them.
    """

    max_over_mean: float
    top_quarter: float
    for_90_percent: float

    def __str__(self) -> str:
        return (
            f"the busiest expert of a layer gets {self.max_over_mean:.2f} times the mean, the "
            f"busiest quarter {self.top_quarter:.0%} of all tokens, and "
            f"{self.for_90_percent:.0%} of the experts get 90%"
        )


def skew_of(layers: Sequence[Sequence[float]]) -> Skew:
    """Measure loads of experts, one sequence for each layer; layers without load do not count."""
    found = []
    for loads in layers:
        total = sum(loads)
        if total <= 0:
            continue
        shares = sorted((load / total for load in loads), reverse=True)
        count = len(shares)
        needed = next(
            (i for i, held in enumerate(accumulate(shares), 1) if held >= 0.9 - 1e-12), count
        )
        found.append((shares[0] * count, sum(shares[: count // 4]), needed / count))
    assert found, "nothing was routed"
    return Skew(*(fmean(figures) for figures in zip(*found, strict=True)))


def load_histogram(path: Path) -> Routing:
    """Read a JSON list of how many tokens each expert of a layer got.

    Raises:
        PlanError: the file is not such a list.
    """
    counts = read_json(path, "expert histogram")
    good = isinstance(counts, list) and all(
        isinstance(c, int | float) and not isinstance(c, bool) and math.isfinite(c) and c >= 0
        for c in counts
    )
    if not good or not sum(counts) > 0:
        raise PlanError(f"expert histogram {path} is not a JSON list of counts, one for an expert")
    total = sum(counts)
    return Routing(tuple(c / total for c in counts))
