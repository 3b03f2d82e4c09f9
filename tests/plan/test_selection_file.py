"""Recorded selections: read, replayed, and refused where they are none."""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from hotset.errors import PlanError
from hotset.plan.selection_file import RecordedSelections, load_selections, save_selections

LAYERS, SELECTED, CONTEXT, STEPS = 2, 64, 600, 60


def record(stays: float = 1.2) -> np.ndarray:
    random = np.random.default_rng(3)
    scores = random.standard_normal((STEPS, LAYERS, CONTEXT))
    scores += stays * random.standard_normal((LAYERS, CONTEXT))
    scores[0, :, -1] = 9  # the newest position is selected first, so that none is new later
    return np.argsort(-scores, axis=2)[:, :, :SELECTED].astype(np.int32)


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
    positions = record()
    save_selections(tmp_path / "one.npy", positions)
    recorded = load_selections(tmp_path / "one.npy")
    assert recorded.misses(CONTEXT, SELECTED, slots) == pytest.approx(simulated(positions, slots))


def test_overlap_is_that_of_neighbouring_steps() -> None:
    positions = np.tile(np.arange(8, dtype=np.int32), (10, 1, 1))
    positions[1::2] += 2
    recorded = RecordedSelections(Path("x"), positions)
    assert recorded.overlap == 0.75
    assert recorded.misses(100, 8, 8) == 2
    assert recorded.misses(100, 8, 10) == 0
    assert recorded.misses(10, 8, 10) == 0


def test_tokens_that_were_generated_meanwhile_are_not_fetched() -> None:
    positions = np.tile(np.arange(8, dtype=np.int32), (10, 1, 1))
    positions[:, 0, 7] = np.arange(20, 30)  # each step selects the newest token
    assert RecordedSelections(Path("x"), positions).misses(100, 8, 8) == 0


def test_a_file_of_another_model_or_too_few_slots_is_refused() -> None:
    recorded = RecordedSelections(Path("one.npy"), record())
    with pytest.raises(PlanError, match="has 64 positions per step and layer, but the model selec"):
        recorded.misses(CONTEXT, 2048, 4096)
    with pytest.raises(PlanError, match="hot set of 63 tokens"):
        recorded.misses(CONTEXT, SELECTED, 63)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a numpy array"),
        (b"[1, 2]", "not a numpy array"),
        (pickle.dumps([1, 2]), "not a numpy array"),
        (np.zeros((9, 2), np.int32), "something else"),
        (np.zeros((9, 2, 4), np.int64), "something else"),
        (np.array([None]), "not a numpy array"),
        (np.zeros((7, 2, 4), np.int32), r"shape \[7, 2, 4\]; expected at least 8 steps"),
        (np.zeros((9, 0, 4), np.int32), "expected at least 8 steps, a layer"),
        (np.full((9, 2, 4), -1, np.int32), "position -1; expected 0 to"),
        (np.full((9, 2, 4), 2**30, np.int32), "position 1073741824"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "one.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(PlanError, match=message):
        load_selections(path)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match=r"selection file nowhere\.npy cannot be read: No such"):
        load_selections(Path("nowhere.npy"))
