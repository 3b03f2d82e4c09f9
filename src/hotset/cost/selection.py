"""How many rows a least-recently-used set of slots misses, by how much selections overlap.

A sparse layer selects K of the N positions of a context in each step, those of the highest score.
Scores are taken as `sqrt(c) * a + sqrt(1 - c) * noise`, both normal: *a* belongs to a position and
stays, *noise* is drawn anew in each step. A position with `a = z` is then selected with chance
`p(z) = Q((x - sqrt(c) z) / sqrt(1 - c))`, `x = Q^-1(K / N)`, and *c* follows from the overlap, the
share of a selection that the next one has as well: `E[p^2] / E[p]`.

A guess of a selection is one by scores that correlate with the step's: rho follows from the share
that it has of the selection as *c* does from the overlap.

Source of the misses: Che, Tung and Wang, "Hierarchical Web caching systems" (2002): a position
stays in S slots for a characteristic time tau, with `N E[1 - (1 - p)^tau] = S`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

from hotset.errors import PlanError

_NORMAL = NormalDist()
_WIDTH, _POINTS = 7.0, 560  # of z: the chance beyond is 3e-12; 0.025 apart
_HALVINGS = 32  # to nine digits
_TAUS, _FEWER_HALVINGS = (1e-3, 1e12), 22  # by ratio, to five digits
_LEAST_CHANCE = 1e-300
_ERRORS, _ERROR_WIDTH = 40, 4.5  # points of a score beyond what is selected, and how far beyond
GUESSED = 0.8  # of a selection, by its indexer on the input of the layer that selected before
MOST_OVERLAP = 0.98  # beyond, p(z) is steeper than the points of z resolve


class Guesses(NamedTuple):
    """Rows per layer and step, of a layer that is guessed for.

    Attributes:
        guessed: that come ahead.
        right: of these, that are then selected.
        missed: that are selected and waited for.
    """

    guessed: float
    right: float
    missed: float


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
        check_share(self.overlap, "the overlap of selections")
        if slots < selected:
            raise PlanError(f"a hot set of {slots} tokens does not hold a selection of {selected}")
        if slots >= context or selected >= context:
            return 0.0
        return _misses(self.overlap, context, selected, slots)

    def guesses(self, context: float, selected: int, slots: int, right: float) -> Guesses:
        """What comes ahead where `right` of a selection is guessed; see `misses` for the others.

        Raises:
            PlanError: see `misses`; likewise of `right`.
        """
        check_share(right, "the share of a selection that is guessed")
        if not self.misses(context, selected, slots):
            return Guesses(0.0, 0.0, 0.0)
        return _guesses(self.overlap, right, context, selected, slots)


def check_share(share: float, name: str) -> None:
    """Raise PlanError where a share of a selection, named `name`, is none that is known."""
    if not 0 < share <= MOST_OVERLAP:
        raise PlanError(f"{name} is {share:g}; expected above 0 and at most {MOST_OVERLAP}")


@lru_cache(maxsize=4096)  # an engine asks while it schedules
def _misses(overlap: float, context: float, selected: int, slots: int) -> float:
    share = selected / context
    chances = _chances(share, correlation(share, max(share, overlap)))
    stay = _bisect(lambda tau: context * _mean(chances, tau, 0) - slots, 1.0, 1e12)
    return max(0.0, selected - context * _mean(chances, stay, 1))


@lru_cache(maxsize=4096)
def _guesses(overlap: float, right: float, context: float, selected: int, slots: int) -> Guesses:
    """Slots hold what was selected or guessed last, so that each step uses them twice.

    With a chance of p to be selected, g to be guessed and b for both, a position is used in a step
    with chance `u = p + g - b`. Before the guess a slot has it with chance `1 - (1 - u)^tau`, and
    between guess and selection with `1 - (1 - g) (1 - u)^tau'`; each sums up to S.
    """
    share = selected / context
    c, rho = (correlation(share, max(share, each)) for each in (overlap, right))
    columns: list[list[float]] = [[] for _ in range(5)]
    logs, one, guess, both, alone = columns
    for (weight, p), (_, g), found in zip(
        _chances(share, c), _chances(share, rho**2 * c), _both(share, c, rho), strict=True
    ):
        b = min(found, p, g)
        logs.append(math.log(max(_LEAST_CHANCE, 1 - p - g + b)))
        for column, value in ((one, 1.0), (guess, g), (both, b), (alone, p - b)):
            column.append(context * weight * value)
    rest = [each - guessed for each, guessed in zip(one, guess, strict=True)]

    def left(values: list[float], tau: float) -> float:
        """Their sum over positions that no step of tau has used."""
        return sum(value * math.exp(tau * log) for value, log in zip(values, logs, strict=True))

    before = _bisect(lambda tau: context - left(one, tau) - slots, *_TAUS, _FEWER_HALVINGS)
    after = _bisect(lambda tau: context - left(rest, tau) - slots, *_TAUS, _FEWER_HALVINGS)
    return Guesses(left(guess, before), left(both, before), left(alone, after))


@lru_cache(maxsize=1024)
def _both(share: float, c: float, rho: float) -> tuple[float, ...]:
    """For each z the chance that a position is selected and guessed, too."""
    threshold = _NORMAL.inv_cdf(1 - share)
    step, width = 2 * _WIDTH / _POINTS, _ERROR_WIDTH / _ERRORS
    scale, error = math.sqrt(1 - c), math.sqrt(1 - rho**2)
    scores = [threshold + width * (i + 0.5) for i in range(_ERRORS)]
    guessed = [_NORMAL.cdf((rho * s - threshold) / error) * width / scale for s in scores]
    means = (math.sqrt(c) * (step * (i + 0.5) - _WIDTH) for i in range(_POINTS))
    return tuple(
        sum(g * _NORMAL.pdf((s - mean) / scale) for g, s in zip(guessed, scores, strict=True))
        for mean in means
    )


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


def _bisect(
    rising: Callable[[float], float], low: float, high: float, halvings: int = _HALVINGS
) -> float:
    """Where `rising` passes 0 between two bounds; by ratio, where both are above 0."""
    for _ in range(halvings):
        middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
