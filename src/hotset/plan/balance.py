"""How evenly placed experts would load devices, by routing that was recorded."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hotset.cost.routing import skew_of
from hotset.errors import PlanError
from hotset.experts.placement import History, Placement, in_order, measure, place, round_robin
from hotset.foreign_text import parse_json
from hotset.plan.text import rows as columns

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recording:
    """What `hotset bench --record-routing` has written.

    Attributes:
        about: model, workload and so on.
        history: `[steps, layers, experts]` tokens.
        layers: their names.
    """

    about: dict[str, Any]
    history: Counts
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Loads:
    """Tokens that devices compute, mean over layers.

    Attributes:
        max_load: of the busiest device over all steps.
        mean_load: over devices.
        imbalance: the first over the second, mean over layers.
        worst_imbalance: of the layer where it is highest.
        step_imbalance: of the device that is busiest in a step, for which all others wait: the sum
            over steps and layers over the same sum of the mean device.
    """

    max_load: float
    mean_load: float
    imbalance: float
    worst_imbalance: float
    step_imbalance: float


@dataclass(frozen=True)
class Case:
    """One way to place.

    Attributes:
        name: in tables.
        num_replicas: copies beyond the first, per layer.
        loads: on the steps it was made from, which are all.
        unseen: made from the first half of the steps, on the second; None for a single step.
        placements: of each layer, made from all steps.
    """

    name: str
    num_replicas: int
    loads: Loads
    unseen: Loads | None
    placements: tuple[Placement, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `placements` is `[layers][devices]` lists of expert ids."""
        return {
            "name": self.name,
            "num_replicas": self.num_replicas,
            "loads": asdict(self.loads),
            "unseen": None if self.unseen is None else asdict(self.unseen),
            "placements": [[list(held) for held in p.devices] for p in self.placements],
        }


def load_recording(path: Path) -> Recording:
    """Read a `.npz` or `.json` file of `hotset bench --record-routing`.

    Raises:
        PlanError: the file is not such a one.
    """
    wrong = f"routing {path} is not a file of 'hotset bench --record-routing'"
    try:
        if path.suffix == ".json":
            data = parse_json(path.read_bytes())
            about, history, layers = data["about"], np.array(data["history"]), data["layers"]
        else:
            with np.load(path, allow_pickle=False) as stored:
                about = parse_json(str(stored["about"]))
                history, layers = stored["history"], stored["layers"].tolist()
    except OSError as error:
        raise PlanError(f"routing {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise PlanError(wrong) from error
    good = (
        isinstance(about, dict)
        and history.ndim == 3
        and history.size > 0
        and np.issubdtype(history.dtype, np.integer)
        and len(layers) == history.shape[1]
    )
    if not good or history.min() < 0 or history.max() == 0:
        raise PlanError(wrong)
    return Recording(about, history.astype(np.int64), tuple(map(str, layers)))


def balance(recording: Recording, num_devices: int, num_replicas: int) -> list[Case]:
    """Loads with experts in order and round robin, and after each way to place.

    Args:
        recording: of a real run.
        num_devices: that share the experts of every layer.
        num_replicas: copies of a layer beyond the first, in the last case.

    Raises:
        PlanError: a number is out of range.
    """
    num_experts = recording.history.shape[2]
    if not 1 <= num_devices <= num_experts:
        raise PlanError(
            f"{num_devices} devices for {num_experts} experts a layer: expected 1 to {num_experts}"
        )
    cases: list[tuple[str, int, Callable[[History], Placement]]] = [
        ("in order", 0, lambda h: in_order(num_experts, num_devices)),
        ("round robin", 0, lambda h: round_robin(num_experts, num_devices)),
        ("greedy by load", 0, lambda h: place(h, num_devices, co_activation=False)),
        ("co-activation", 0, lambda h: place(h, num_devices)),
    ]
    if num_replicas:
        cases.append(
            (
                "with replicas",
                num_replicas,
                lambda h: place(h, num_devices, num_replicas=num_replicas),
            )
        )
    history = recording.history
    half = len(history) // 2
    made = []
    for name, replicas, make in cases:
        placements = tuple(make(layer.tolist()) for layer in history.swapaxes(0, 1))
        unseen = None
        if half:
            earlier = [make(layer.tolist()) for layer in history[:half].swapaxes(0, 1)]
            unseen = _loads(earlier, history[half:])
        made.append(Case(name, replicas, _loads(placements, history), unseen, placements))
    return made


def balance_table(recording: Recording, cases: list[Case], num_devices: int) -> str:
    """What `hotset plan --routing` prints."""
    steps, layers, experts = recording.history.shape
    about = ", ".join(
        str(recording.about[key]) for key in ("model", "workload") if recording.about.get(key)
    )
    head = ("placement", "copies", "max load", "mean load", "max/mean", "worst", "in a step")
    has_unseen = any(case.unseen for case in cases)
    rows = [head + (("unseen max/mean", "in a step") if has_unseen else ())]
    for case in cases:
        loads = case.loads
        rows.append(
            (
                case.name,
                f"+{case.num_replicas}",
                f"{loads.max_load:,.0f}",
                f"{loads.mean_load:,.0f}",
                f"{loads.imbalance:.3f}",
                f"{loads.worst_imbalance:.3f}",
                f"{loads.step_imbalance:.3f}",
            )
            + (
                (f"{case.unseen.imbalance:.3f}", f"{case.unseen.step_imbalance:.3f}")
                if case.unseen
                else ()
            )
        )
    notes = [
        "Loads are tokens of a device over all steps, mean over layers; worst is the layer with "
        "the highest max/mean.",
        "In a step: the busiest device of each step over the mean one; all others wait for it.",
    ]
    if has_unseen:
        notes.append("Unseen: placed by the first half of the steps, measured on the second.")
    used = skew_of(recording.history.sum(0).tolist())
    notes.insert(0, f"All steps: {used}; means over layers.")
    title = f"{experts} experts of {layers} layers on {num_devices} devices, {steps} steps"
    return "\n".join([f"{title} ({about})" if about else title, "", columns(rows), "", *notes])


def _loads(placements: Sequence[Placement], history: Counts) -> Loads:
    """Loads with one placement per layer, on `[steps, layers, experts]`."""
    balances = [
        measure(placement, layer.tolist())
        for placement, layer in zip(placements, history.swapaxes(0, 1), strict=True)
    ]
    means = np.array([b.mean_load for b in balances])
    maxima = np.array([b.max_load for b in balances])
    used = means > 0
    ratios = maxima[used] / means[used] if used.any() else np.ones(1)
    in_steps = sum(b.step_max_load for b in balances) * len(history)
    return Loads(
        max_load=float(maxima.mean()),
        mean_load=float(means.mean()),
        imbalance=float(ratios.mean()),
        worst_imbalance=float(ratios.max()),
        step_imbalance=float(in_steps / means.sum()) if used.any() else 1.0,
    )
