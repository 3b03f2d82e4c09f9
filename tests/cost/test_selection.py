"""Misses of least-recently-used slots: the formula against its table and against a simulation."""

import math

import numpy as np
import pytest

from hotset.cost.selection import DrawnSelections, correlation
from hotset.errors import PlanError

CONTEXT, SELECTED = 36_864, 2048


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (0.35, [1331, 854, 542, 340, 43]),
        (0.40, [1229, 719, 413, 233, 19]),
        (0.50, [1024, 470, 205, 87, 2]),
    ],
)
def test_misses_fall_with_slots_and_overlap(overlap: float, expected: list[int]) -> None:
    drawn = DrawnSelections(overlap)
    slots = (2048, 4096, 6144, 8192, 16_384)
    assert [round(drawn.misses(CONTEXT, SELECTED, n)) for n in slots] == expected
    # With room for one selection, what the one before had as well are the hits.
    assert drawn.misses(CONTEXT, SELECTED, SELECTED) == pytest.approx(
        (1 - overlap) * SELECTED, rel=1e-3
    )


def test_a_context_that_fits_misses_nothing() -> None:
    assert DrawnSelections(0.4).misses(4096, SELECTED, 4096) == 0
    assert DrawnSelections(0.4).misses(2000, SELECTED, 4096) == 0


def test_independent_selections_overlap_by_their_share() -> None:
    few = DrawnSelections(0.05).misses(CONTEXT, SELECTED, SELECTED)
    assert few == pytest.approx((1 - SELECTED / CONTEXT) * SELECTED, rel=1e-3)


def draw(overlap: float, context: int, selected: int, steps: int) -> list[np.ndarray]:
    """Selections of one layer, by the formula of the module."""
    c, random = correlation(selected / context, overlap), np.random.default_rng(0)
    stays = math.sqrt(c) * random.standard_normal(context)
    noise = math.sqrt(1 - c) * random.standard_normal((steps, context))
    return list(np.argpartition(-(stays + noise), selected, axis=1)[:, :selected])


@pytest.mark.parametrize(("overlap", "slots"), [(0.35, 4096), (0.5, 3072), (0.8, 1536)])
def test_misses_are_those_of_a_simulated_lru_within_one_percent_of_a_selection(
    overlap: float, slots: int
) -> None:
    context, selected, steps = 16_384, 1024, 60
    last_used = np.full(context, -1)
    misses, common, before = [], [], None
    for step, chosen in enumerate(draw(overlap, context, selected, steps)):
        oldest = np.sort(last_used)[-slots]
        if step >= 20:
            assert oldest >= 0  # all slots are in use
            later = np.count_nonzero(last_used > oldest)
            # Of the oldest step that has slots, only some positions have kept theirs.
            kept = (slots - later) / np.count_nonzero(last_used == oldest)
            ages = last_used[chosen]
            misses.append(np.count_nonzero(ages < oldest))
            misses[-1] += (1 - kept) * np.count_nonzero(ages == oldest)
        if before is not None:
            common.append(len(np.intersect1d(before, chosen)) / selected)
        last_used[chosen], before = step, chosen
    assert np.mean(common) == pytest.approx(overlap, abs=0.01)
    predicted = DrawnSelections(overlap).misses(context, selected, slots)
    assert predicted == pytest.approx(np.mean(misses), abs=0.01 * selected)


@pytest.mark.parametrize(
    ("overlap", "slots", "right"), [(0.35, 2048, 0.8), (0.5, 2048, 0.8), (0.4, 3072, 0.5)]
)
def test_what_is_guessed_is_that_of_a_simulated_lru_within_two_percent_of_a_selection(
    overlap: float, slots: int, right: float
) -> None:
    context, selected, steps = 16_384, 1024, 40
    share, random = selected / context, np.random.default_rng(0)
    c, rho = (correlation(share, each) for each in (overlap, right))
    stays = math.sqrt(c) * random.standard_normal(context)
    order = np.arange(slots)  # positions in slots, from the longest unused
    found = []

    def use(chosen: np.ndarray) -> np.ndarray:
        """Those that no slot had."""
        nonlocal order
        missing = np.setdiff1d(chosen, order)
        rest = order[~np.isin(order, chosen)][len(missing) :]
        order = np.concatenate([rest, missing, np.intersect1d(order, chosen)])
        return missing

    for _ in range(steps):
        scores = stays + math.sqrt(1 - c) * random.standard_normal(context)
        error = math.sqrt(1 - rho**2) * random.standard_normal(context)
        guess, chosen = (
            np.argpartition(-each, selected)[:selected] for each in (rho * scores + error, scores)
        )
        ahead = use(guess)
        found.append((len(ahead), len(np.intersect1d(ahead, chosen)), len(use(chosen))))
    measured = np.mean(found[steps // 2 :], axis=0)
    planned = DrawnSelections(overlap).guesses(context, selected, slots, right)
    assert planned == pytest.approx(tuple(measured), abs=0.02 * selected)


def test_a_share_that_no_guess_has_is_refused() -> None:
    with pytest.raises(PlanError, match=r"selection that is guessed is 1; expected above 0 and at"):
        DrawnSelections(0.4).guesses(CONTEXT, SELECTED, 4096, 1.0)
    assert DrawnSelections(0.4).guesses(4096, SELECTED, 4096, 0.8) == (0, 0, 0)


@pytest.mark.parametrize(
    ("overlap", "slots", "message"),
    [
        (0.4, 2047, "hot set of 2047 tokens does not hold a selection of 2048"),
        (0.0, 4096, "overlap of selections is 0; expected above 0"),
        (0.99, 4096, "is 0.99; expected above 0 and at most 0.98"),
    ],
)
def test_what_cannot_be_is_refused(overlap: float, slots: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DrawnSelections(overlap).misses(CONTEXT, SELECTED, slots)
