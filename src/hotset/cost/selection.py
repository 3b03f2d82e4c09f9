"""How many rows a least-recently-used set of slots misses, by how much selections overlap.

A sparse layer selects K of the N positions of a context in each step, those of the highest score.
Scores are taken as `sqrt(c) * a + sqrt(1 - c) * noise`, both normal: *a* belongs to a position and
stays, *noise* is drawn anew in each step. A position with `a = z` is then selected with chance
`p(z) = Q((x - sqrt(c) z) / sqrt(1 - c))`, `x = Q^-1(K / N)`, and *c* follows from the overlap, the
share of a selection that the next one has as well: `E[p^2] / E[p]`.

Source of the misses: Che, Tung and Wang, "Hierarchical Web caching systems" (2002): a position
stays in S slots for a characteristic time tau, with `N E[1 - (1 - p)^tau] = S`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from hotset.errors import PlanError

_NORMAL = NormalDist()
_WIDTH, _POINTS = 7.0, 560  # of z: the chance beyond is 3e-12; 0.025 apart
_HALVINGS = 32  # to nine digits
GUESSED = 0.8  # of a selection, by its indexer on the input of the layer that selected before
MOST_OVERLAP = 0.98  # beyond, p(z) is steeper than the points of z resolve


@dataclass(frozen=True, slots=True)
class DrawnSelections:
    """Selections by the formula above.

    Attributes:
        overlap: of the selections of neighbouring steps; more where K / N is more, which
            independent ones have in common.
    """

    overlap: float = 0.4

    def misses(self, context: float, selected: int, slots: int) -> float:
        """Rows that a step misses in a layer.

        Args:
            context: N, positions of the request.
            selected: K of them, in each step.
            slots: S, at least K.

        Raises:
            PlanError: `slots` hold no selection, or `overlap` is none that is known.
        """
        if not 0 < self.overlap <= MOST_OVERLAP:
            raise PlanError(
                f"the overlap of selections is {self.overlap:g}; expected above 0 and at most "
                f"{MOST_OVERLAP}"
            )
        if slots < selected:
            raise PlanError(f"a hot set of {slots} tokens does not hold a selection of {selected}")
        if slots >= context or selected >= context:
            return 0.0
        return _misses(self.overlap, context, selected, slots)


@lru_cache(maxsize=4096)  # an engine asks while it schedules
def _misses(overlap: float, context: float, selected: int, slots: int) -> float:
    share = selected / context
    chances = _chances(share, correlation(share, max(share, overlap)))
    stay = _bisect(lambda tau: context * _mean(chances, tau, 0) - slots, 1.0, 1e12)
    return max(0.0, selected - context * _mean(chances, stay, 1))


@lru_cache(maxsize=256)
def correlation(share: float, overlap: float) -> float:
    """The *c* at which selections of `share` of all positions overlap by `overlap`.

    Args:
        share: K / N.
        overlap: from `share`, for which *c* is 0, to `MOST_OVERLAP`.
    """

    def excess(c: float) -> float:
        chances = _chances(share, c)
        return sum(weight * p * p for weight, p in chances) / share - overlap

    return _bisect(excess, 0.0, 1.0 - 1e-6)


@lru_cache(maxsize=1024)
def _chances(share: float, c: float) -> tuple[tuple[float, float], ...]:
    """Weight of each z and the chance there that a position is selected."""
    threshold = _NORMAL.inv_cdf(1 - share)
    step = 2 * _WIDTH / _POINTS
    points = (step * (i + 0.5) - _WIDTH for i in range(_POINTS))
    scale = math.sqrt(1 - c)
    return tuple(
        (step * _NORMAL.pdf(z), _NORMAL.cdf((math.sqrt(c) * z - threshold) / scale)) for z in points
    )


def _mean(chances: tuple[tuple[float, float], ...], tau: float, power: int) -> float:
    """`E[p^power (1 - (1 - p)^tau)]`."""
    return -sum(
        weight * p**power * math.expm1(tau * math.log1p(-p)) if p < 1 else -weight
        for weight, p in chances
    )


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where `rising` passes 0 between two bounds; by ratio, where both are above 0."""
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
