"""The preset `S` in small: hot requests beside resident ones, in a steady state."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hotset.bench.campaign import Order, run_bench
from hotset.bench.html import page
from hotset.bench.presets import PRESETS
from hotset.bench.report import text
from hotset.bench.result import BenchResult
from hotset.bench.runs import RunOptions, Say
from hotset.cost.selection import DrawnSelections
from hotset.errors import HotsetError
from hotset.options import Options
from hotset.plan.selection_file import load_selections

STEPS = 24
QUIET = Say(lambda line: None, lambda make: None)


def order(arms: list[str], run: RunOptions, **changes: Any) -> Order:
    preset = PRESETS["S-small"]
    sizes = {"hot_gib": preset.hot_gib, "host_gib": preset.host_gib, **preset.engine}
    config = Options.of(**{"model": preset.model, **sizes, **changes})
    return Order(preset.spec, config, True, arms, 1, run)


@pytest.fixture(scope="module")
def result() -> BenchResult:
    run = RunOptions(steady_steps=STEPS, selection_overlap=0.4, hardware="h200", verify=True)
    return run_bench(order(["resident", "hot-set"], run), QUIET)


def test_more_requests_run_where_some_are_hot_and_answers_are_the_same(
    result: BenchResult,
) -> None:
    resident, hot = (result.typical(arm).steady[0] for arm in ("resident", "hot-set"))
    assert resident["users"] == 3 and resident["hot_users"] == 0 and resident["misses"] is None
    assert hot["users"] >= 2 * resident["users"] and hot["hot_users"] > 0
    assert hot["preemptions"] == resident["preemptions"] == 0
    assert hot["steps"] == resident["steps"] == STEPS
    assert result.verification is not None
    assert result.verification["runs"][0]["compared"] == 3
    assert result.verification["differing"] == 0


def test_misses_and_users_are_as_planned(result: BenchResult) -> None:
    hot = result.typical("hot-set").steady[0]
    # Requests leave each other the room that they grow into.
    assert 0.85 < hot["users"] / hot["planned"]["users"] < 1.15
    assert hot["misses"] == pytest.approx(hot["planned"]["misses"], rel=0.15)
    assert hot["hit_rate"] == pytest.approx(1 - hot["misses"] / 48, rel=0.05)


def test_guesses_are_as_planned_and_change_no_answer() -> None:
    run = RunOptions(
        steady_steps=STEPS,
        selection_overlap=0.4,
        selection_guessed=0.7,
        hardware="h200",
        verify=True,
    )
    lines: list[str] = []
    say = Say(lines.append, lambda make: None)
    result = run_bench(order(["resident", "hot-set"], run, row_prefetch=2), say)
    assert result.verification is not None
    assert result.verification["runs"][0]["compared"] == 3
    assert result.verification["differing"] == 0
    hot = result.typical("hot-set").steady[0]
    for name in ("misses", "guessed", "guessed_right"):
        assert hot[name] == pytest.approx(hot["planned"][name], rel=0.2), name
    assert 0 < hot["guessed_right"] < hot["guessed"]
    assert any(
        f"{hot['guessed']:,.0f} guessed, {hot['guessed_right']:,.0f} right" in x for x in lines
    )


def test_a_steady_state_is_told_as_any_result(result: BenchResult) -> None:
    assert "times as many" in result.verdict and "were planned" in result.verdict
    assert "none were preempted" in result.verdict and result.verdict in text(result)
    assert "hot-set" in page(result)
    assert json.loads(json.dumps(result.as_dict()))["runs"][1]["steady"][0]["offered"] == 16


def test_work_from_first_to_last_request_has_the_same_answers_in_both_arms() -> None:
    run = RunOptions(selection_overlap=0.4, verify=True)
    asked = order(["resident", "hot-set"], run)
    asked = replace(asked, spec=replace(asked.spec, users=5, output_tokens=16))
    result = run_bench(asked, QUIET)
    assert result.typical("hot-set").engine["turned_hot"] > 0
    assert result.verification is not None
    assert result.verification["runs"][0]["compared"] == 5
    assert result.verification["differing"] == 0
    assert "times as many" in result.verdict and "were planned" not in result.verdict


def test_users_are_offered_in_turn() -> None:
    run = RunOptions(steady_steps=4, steady_users=(2, 5), selection_overlap=0.5)
    steady = run_bench(order(["hot-set"], run), QUIET).runs[0].steady
    assert [one["offered"] for one in steady] == [2, 5]
    assert steady[0]["users"] == 2 and steady[0]["hot_users"] == 0
    assert steady[1]["users"] == 5 and steady[1]["hot_users"] > 0
    assert steady[0]["planned"] is None  # of a CPU that was not measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host_gib": 0.0, "hot_tokens": None}, "host_gib"),
        ({"model": "smollm2-135m", "hot_tokens": None}, "selects no tokens"),
    ],
)
def test_what_cannot_be_hot_is_refused(changes: dict[str, Any], message: str) -> None:
    run = RunOptions(steady_steps=4, selection_overlap=0.4)
    asked = order(["hot-set"], run, **changes)
    with pytest.raises(HotsetError, match=message):
        run_bench(asked, QUIET)


def test_answers_that_end_too_soon_are_refused() -> None:
    run = RunOptions(steady_steps=60, selection_overlap=0.4)
    asked = order(["resident"], run)
    asked = replace(asked, spec=replace(asked.spec, output_tokens=40))
    with pytest.raises(HotsetError, match=r"a request ended before .* give more output_tokens"):
        run_bench(asked, QUIET)


@pytest.mark.parametrize("steady_steps", [0, 20])
def test_what_is_selected_is_recorded_and_replayed_by_a_plan(
    steady_steps: int, tmp_path: Path
) -> None:
    path, lines = tmp_path / "selection.npz", []
    run = RunOptions(
        steady_steps=steady_steps,
        steady_users=(3,) if steady_steps else (),
        selection_overlap=0.4,
        record_selection=path,
    )
    asked = order(["hot-set"], run)
    if not steady_steps:
        asked = replace(asked, spec=replace(asked.spec, users=3, output_tokens=20))
    result = run_bench(asked, Say(lines.append, lambda make: None))

    recorded = load_selections(path)
    assert len(recorded.requests) == 3
    for positions in recorded.requests:
        steps, layers, selected = positions.shape
        assert steps >= 19 and (layers, selected) == (3, 48)
        ends = positions.max((1, 2))
        assert (np.diff(positions, axis=2) > 0).all() and positions.min() >= 0
        assert ends.max() < 512 + 160 and len(set(ends.tolist())) > 1
    # Of so few steps, drawn to overlap by 0.4.
    assert all(0.3 < each < 0.5 for each in recorded.layer_overlaps)
    planned = DrawnSelections(0.4).misses(540, 48, 96)
    assert recorded.misses(540, 48, 96) == pytest.approx(planned, rel=0.25)
    [line] = [line for line in lines if "selections per layer, of 3 requests" in line]
    assert str(path) in line and f"overlap {recorded.overlap:.2f}, by layer" in line
    assert any("selections were recorded" in note for note in result.asked["notes"])


def test_selections_of_a_model_that_attends_to_all_tokens_cannot_be_recorded(
    tmp_path: Path,
) -> None:
    run = RunOptions(record_selection=tmp_path / "x.npz")
    asked = order(["resident"], run, model="smollm2-135m", hot_tokens=None)
    with pytest.raises(HotsetError, match=r"record_selection is .* selects no tokens"):
        run_bench(asked, QUIET)
