"""Loads before and after placing by recorded routing, as a user of `hotset plan` sees them."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hotset.cli.plan import command
from hotset.errors import PlanError
from hotset.experts.placement import in_order
from hotset.plan.balance import balance, load_recording


def write(path: Path, history: np.ndarray) -> Path:
    layers = [f"layers.{i}" for i in range(history.shape[1])]
    about = {"model": "tiny", "workload": "unshared"}
    if path.suffix == ".json":
        data = {"about": about, "layers": layers, "history": history.tolist()}
        path.write_text(json.dumps(data))
    else:
        np.savez(path, history=history, layers=np.array(layers), about=np.array(json.dumps(about)))
    return path


def skewed(steps: int = 40, layers: int = 3, experts: int = 16) -> np.ndarray:
    """Some experts are hot, and experts of one half are busy in the same steps."""
    rng = np.random.default_rng(0)
    rates = 2000.0 / (1 + np.arange(experts)) ** 1.2  # the hot ones side by side
    topics = rng.integers(0, 2, (steps, layers, 1))
    busy = np.where(np.arange(experts) % 2 == topics, 1.7, 0.3)
    return rng.poisson(rates * busy).astype(np.int32)


@pytest.mark.parametrize("name", ["routing.npz", "routing.json"])
def test_placing_by_what_was_recorded_lowers_the_load_of_the_busiest_device(
    name: str, tmp_path: Path
) -> None:
    recording = load_recording(write(tmp_path / name, skewed()))
    cases = {case.name: case for case in balance(recording, 4, 4)}
    ordered, greedy = cases["in order"].loads, cases["greedy by load"].loads
    replicas = cases["with replicas"].loads
    assert replicas.imbalance < greedy.imbalance < ordered.imbalance
    assert cases["co-activation"].loads.step_imbalance < greedy.step_imbalance
    assert replicas.imbalance >= 1
    total = recording.history.sum()
    for case in cases.values():
        assert case.loads.mean_load * 4 * 3 == pytest.approx(total)
        assert case.unseen is not None
        assert case.unseen.imbalance > 1
    assert cases["with replicas"].unseen.imbalance < cases["in order"].unseen.imbalance


def test_the_load_of_experts_in_order_is_the_sum_over_neighbours(tmp_path: Path) -> None:
    history = np.array([[[9, 1, 2, 4]], [[1, 0, 3, 0]]])
    recording = load_recording(write(tmp_path / "r.npz", history))
    [ordered, *_] = balance(recording, 2, 0)
    assert (ordered.loads.max_load, ordered.loads.mean_load) == (11, 10)
    assert ordered.loads.imbalance == 1.1
    assert ordered.loads.step_imbalance == (10 + 3) / (8 + 2)
    assert in_order(5, 2).devices == ((0, 1, 2), (3, 4))


def test_plan_prints_loads_and_gives_placements_as_json(tmp_path: Path) -> None:
    path = write(tmp_path / "r.npz", skewed())
    words = ["--routing", str(path), "--devices", "4"]
    shown = CliRunner().invoke(command, words, catch_exceptions=False).output
    assert "16 experts of 3 layers on 4 devices, 40 steps (tiny, unshared)" in shown
    for name in ("in order", "round robin", "greedy by load", "co-activation", "with replicas"):
        assert f"\n{name} " in shown
    data = json.loads(CliRunner().invoke(command, [*words, "--replicas", "0", "--json"]).output)
    assert [case["name"] for case in data["cases"]][-1] == "co-activation"
    held = [expert for device in data["cases"][-1]["placements"][2] for expert in device]
    assert sorted(held) == list(range(16))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "2"], "go with --routing"),
        (["--routing", "{path}"], "needs --devices"),
        (["--routing", "{path}", "--devices", "17"], "expected 1 to 16"),
        (["--routing", "{path}", "--devices", "0"], "expected 1 to 16"),
        (["--routing", "{path}", "--devices", "2", "--replicas", "-1"], "0 or more"),
        (["--routing", "{path}.no", "--devices", "2"], "cannot be read"),
        (["--routing", "{text}", "--devices", "2"], "is not a file of"),
        (["--routing", "{path}", "--list"], "do not go together"),
    ],
)
def test_what_cannot_be_placed_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.npz", skewed(2))
    text = tmp_path / "text.npz"
    text.write_text("hello")
    done = CliRunner().invoke(command, [w.format(path=path, text=text) for w in words])
    assert isinstance(done.exception, PlanError)
    assert message in str(done.exception)
