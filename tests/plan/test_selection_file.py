"""Recorded selections: read, replayed, and refused where they are none."""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from hotset.cost.selection import DrawnSelections
from hotset.errors import ConfigError, PlanError
from hotset.plan.selection_file import RecordedSelections, load_selections, save_selections

LAYERS, SELECTED, CONTEXT, STEPS = 2, 64, 600, 60


def record(stays: float = 1.2) -> np.ndarray:
    random = np.random.default_rng(3)
    scores = random.standard_normal((STEPS, LAYERS, CONTEXT))
    scores += stays * random.standard_normal((LAYERS, CONTEXT))
    scores[0, :, -1] = 9  # the newest position is selected first, so that none is new later
    return np.sort(np.argsort(-scores, axis=2)[:, :, :SELECTED], axis=2).astype(np.int32)


def simulated(positions: np.ndarray, slots: int) -> float:
    """Misses of an LRU of `slots` positions, one position after another."""
    misses = 0
    for layer in range(LAYERS):
        held: OrderedDict[int, None] = OrderedDict()
        for step in range(STEPS):
            chosen = [int(position) for position in positions[step, layer]]
            if step >= STEPS // 4:
                misses += sum(position not in held for position in chosen)
            for position in chosen:
                held[position] = None
                held.move_to_end(position)
            while len(held) > slots:
                held.popitem(last=False)
    return misses / (LAYERS * (STEPS - STEPS // 4))


@pytest.mark.parametrize("slots", [64, 96, 128, 200, 400, 599])
def test_a_replay_misses_what_a_simulated_lru_misses(tmp_path: Path, slots: int) -> None:
    several = [record(), record(stays=0.7)]
    save_selections(tmp_path / "two.npz", several, {})
    recorded = load_selections(tmp_path / "two.npz")
    for one, other in zip(recorded.requests, several, strict=True):
        assert np.array_equal(one, other)
    expected = sum(simulated(positions, slots) for positions in several) / 2
    assert recorded.misses(CONTEXT, SELECTED, slots) == pytest.approx(expected)


def test_overlap_is_that_of_neighbouring_steps() -> None:
    positions = np.tile(np.arange(8, dtype=np.int32), (10, 1, 1))
    positions[1::2] += 2
    recorded = RecordedSelections(Path("x"), (positions,))
    assert recorded.overlap == 0.75
    still = np.tile(np.arange(8, dtype=np.int32), (10, 1, 1))
    two = np.concatenate([positions, still], axis=1)
    assert RecordedSelections(Path("x"), (two, two)).layer_overlaps == (0.75, 1.0)
    assert recorded.misses(100, 8, 8) == 2
    assert recorded.misses(100, 8, 10) == 0
    assert recorded.misses(10, 8, 10) == 0


def test_guesses_are_those_of_drawn_selections_for_as_many_misses() -> None:
    recorded = RecordedSelections(Path("x"), (record(),))
    drawn = DrawnSelections(recorded.overlap)
    found, theirs = (each.guesses(CONTEXT, SELECTED, 96, 0.8) for each in (recorded, drawn))
    ratio = recorded.misses(CONTEXT, SELECTED, 96) / drawn.misses(CONTEXT, SELECTED, 96)
    assert found == pytest.approx([ratio * rows for rows in theirs]) and min(found) > 0
    moving = np.arange(80, dtype=np.int32).reshape(10, 1, 8)  # nothing is selected twice
    assert RecordedSelections(Path("x"), (moving,)).guesses(80, 8, 16, 0.8).guessed >= 0


def test_tokens_that_were_generated_meanwhile_are_not_fetched() -> None:
    positions = np.tile(np.arange(8, dtype=np.int32), (10, 1, 1))
    positions[:, 0, 7] = np.arange(20, 30)  # each step selects the newest token
    assert RecordedSelections(Path("x"), (positions,)).misses(100, 8, 8) == 0


def test_a_file_of_another_model_or_too_few_slots_is_refused() -> None:
    recorded = RecordedSelections(Path("one.npz"), (record(),))
    with pytest.raises(PlanError, match="has 64 positions per step and layer, but the model selec"):
        recorded.misses(CONTEXT, 2048, 4096)
    with pytest.raises(PlanError, match="hot set of 63 tokens"):
        recorded.misses(CONTEXT, SELECTED, 63)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no archive of numpy arrays"),
        (b"[1, 2]", "is no archive of numpy arrays"),
        (pickle.dumps([1, 2]), "is no archive of numpy arrays"),
        ({"other": np.zeros(3)}, "something else; expected int32 arrays gaps_0"),
        ({"gaps_0": np.zeros((9, 2), np.int32)}, "something else as gaps_0"),
        ({"gaps_0": np.zeros((9, 2, 4), np.int64)}, "something else as gaps_0"),
        ({"gaps_0": np.array([None])}, "is no archive of numpy arrays"),
        (
            {"gaps_0": np.ones((7, 2, 4), np.int32)},
            r"shape \[7, 2, 4\] as gaps_0; expected",
        ),
        ({"gaps_0": np.ones((9, 0, 4), np.int32)}, "expected at least 8 steps, a layer"),
        ({"gaps_0": np.full((9, 2, 4), -1, np.int32)}, "position -4; expected 0 to"),
        ({"gaps_0": np.full((9, 2, 4), 2**30, np.int32)}, "position 4294967296"),
        ({"gaps_0": np.zeros((9, 2, 4), np.int32)}, "has a position twice"),
        (
            {"gaps_0": np.ones((9, 2, 4), np.int32), "gaps_1": np.ones((9, 3, 4), np.int32)},
            "requests of different models",
        ),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "one.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        assert isinstance(content, dict)
        np.savez(path, **content)
    with pytest.raises(PlanError, match=message):
        load_selections(path)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match=r"selection file nowhere\.npz cannot be read: No such"):
        load_selections(Path("nowhere.npz"))


def test_a_single_array_is_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", record())
    with pytest.raises(PlanError, match="is no archive of numpy arrays; expected int32 arrays"):
        load_selections(tmp_path / "one.npy")


def test_a_file_of_no_request_that_is_long_enough_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    with pytest.raises(ConfigError, match="no request decoded 8 steps"):
        save_selections(path, [record()[:7]], {})
    assert not path.exists()
    save_selections(path, [record()[:7], record()], {"model": "x"})
    assert len(load_selections(path).requests) == 1
    assert path.stat().st_size < 0.4 * record().nbytes
