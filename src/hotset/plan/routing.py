"""Which experts a batch reaches: uniform routing, or a histogram measured on real traffic."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

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
        copies, which counts them as reached like the others.
        """
        slots = math.ceil(num_experts / ranks)
        if not self.shares:
            return slots * reach(top_k / num_experts, tokens)
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


def load_histogram(path: Path) -> Routing:
    """Read a JSON list of how many tokens each expert of a layer got.

    Raises:
        PlanError: the file is not such a list.
    """
    try:
        counts = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanError(f"expert histogram {path} cannot be read: {reason}") from error
    except json.JSONDecodeError as error:
        raise PlanError(f"expert histogram {path} is not JSON: {error}") from error
    good = isinstance(counts, list) and all(
        isinstance(c, int | float) and not isinstance(c, bool) and math.isfinite(c) and c >= 0
        for c in counts
    )
    if not good or not sum(counts) > 0:
        raise PlanError(f"expert histogram {path} is not a JSON list of counts, one for an expert")
    total = sum(counts)
    return Routing(tuple(c / total for c in counts))
