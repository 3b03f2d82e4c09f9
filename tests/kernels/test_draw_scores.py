"""Scores of a known overlap, drawn by a kernel: in Triton's interpreter where there is no GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hotset.attention.sparse.drawn import DrawnSelection, drawn_scores
from hotset.attention.sparse.select import select_positions
from hotset.cost.selection import DrawnSelections
from hotset.kernels.draw_scores import draw_scores
from hotset.plan.selection_file import RecordedSelections

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.mark.parametrize("width", [1, 511, 512, 1300])
@pytest.mark.parametrize("guess", [None, 0.8])
def test_the_kernel_draws_what_the_reference_draws(width: int, guess: float | None) -> None:
    lengths = torch.tensor([width, 3, max(1, width - 1)], dtype=torch.int32, device=DEVICE)
    lengths = lengths.clamp(max=width)
    seeds = torch.tensor([-5, 2**31 - 1, 0], dtype=torch.int32, device=DEVICE)
    scores = torch.full((3, width), NAN, device=DEVICE)
    asked = {"layer": 7, "correlation": 0.7, "guess_correlation": guess}
    draw_scores(scores, lengths, seeds, count=4, **asked)
    expected = drawn_scores(width, lengths, seeds, **asked)
    for row, length in enumerate(lengths.tolist()):
        drawn = length if length > 4 else 0  # fewer need no scores
        torch.testing.assert_close(scores[row, :drawn], expected[row, :drawn], rtol=2e-5, atol=2e-5)
        assert scores[row, drawn:].isnan().all()


def test_a_score_depends_on_request_layer_position_and_step_alone() -> None:
    def draw(seeds: list[int], lengths: list[int], layer: int) -> torch.Tensor:
        seed, length = (torch.tensor(x, dtype=torch.int32) for x in (seeds, lengths))
        return drawn_scores(400, length, seed, layer=layer, correlation=0.7)

    one = draw([1, 2], [300, 301], 0)
    assert torch.equal(one[1], draw([2], [301], 0)[0])  # whatever the batch
    for other in (draw([3], [300], 0), draw([1], [301], 0), draw([1], [300], 1)):
        assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0, :200], one[0, 200:])


@pytest.mark.parametrize("overlap", [0.35, 0.5])
def test_selections_overlap_and_miss_as_planned(overlap: float) -> None:
    context, count, steps = 8192, 512, 40
    drawn = DrawnSelection.of_overlap(overlap, context=context, count=count)
    positions = []
    for step in range(steps):
        length = torch.tensor([context], dtype=torch.int32)
        scores = drawn_scores(
            context, length + step, torch.tensor([9]), layer=3, correlation=drawn.correlation
        )
        assert abs(scores.mean()) < 0.05 and abs(scores.std() - 1) < 0.02
        positions.append(select_positions(scores, length, count).numpy())
    recorded = RecordedSelections(Path("drawn"), (np.stack(positions),))
    assert recorded.overlap == pytest.approx(overlap, abs=0.015)
    for slots in (512, 1024, 1536):
        planned = DrawnSelections(overlap).misses(context, count, slots)
        assert recorded.misses(context, count, slots) == pytest.approx(planned, abs=0.02 * count)


@pytest.mark.parametrize("guessed", [0.5, 0.8])
def test_a_guess_has_the_share_of_a_selection_that_was_asked_for(guessed: float) -> None:
    context, count, shares = 8192, 512, []
    drawn = DrawnSelection.of_overlap(0.4, context=context, count=count, guessed=guessed)
    for step in range(10):
        length, seeds = torch.tensor([context + step], dtype=torch.int32), torch.tensor([9])
        selections = []
        for is_guess in (False, True):
            scores = torch.zeros(1, context + step)
            seen = length - int(is_guess)  # a guess is made before the token's own key is there
            drawn.replace(scores, seen, seeds, 3, is_guess=is_guess)
            selections.append(set(select_positions(scores, seen, count)[0].tolist()))
        shares.append(len(set.intersection(*selections)) / count)
    assert sum(shares) / len(shares) == pytest.approx(guessed, abs=0.02)


def test_scores_are_replaced_in_place() -> None:
    drawn = DrawnSelection.of_overlap(0.4, context=1000, count=4)
    scores = torch.zeros(2, 64, device=DEVICE)
    lengths = torch.tensor([64, 40], dtype=torch.int32, device=DEVICE)
    seeds = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    drawn.replace(scores, lengths, seeds, layer=1)
    expected = drawn_scores(64, lengths, seeds, layer=1, correlation=drawn.correlation)
    torch.testing.assert_close(scores[0], expected[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(scores[1, :40], expected[1, :40], rtol=2e-5, atol=2e-5)
