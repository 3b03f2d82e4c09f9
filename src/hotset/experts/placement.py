"""Which device holds which experts of a layer, chosen from how they were used before.

Source: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024, load
balancing: greedy by load, and with experts that are busy at the same time kept apart. How the two
are weighed against each other is ours; see `place`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hotset.errors import PlanError

History = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Placement:
    """The experts that each device holds.

    Attributes:
        devices: for each device, the ids of its experts in ascending order; an expert that has
            copies is on several.
    """

    devices: tuple[tuple[int, ...], ...]

    @property
    def num_copies(self) -> dict[int, int]:
        """On how many devices each expert is."""
        copies: dict[int, int] = {}
        for experts in self.devices:
            for expert in experts:
                copies[expert] = copies.get(expert, 0) + 1
        return copies


@dataclass(frozen=True)
class Balance:
    """Tokens that devices compute under a placement, an expert's divided evenly over its copies.

    Attributes:
        device_loads: of each device, over the whole history.
        max_load: of the busiest of them.
        mean_load: over them; the same for every placement.
        step_max_load: of the device that is busiest in a step, mean over steps. All wait for it,
            so this is what a layer's time follows.
    """

    device_loads: tuple[float, ...]
    max_load: float
    mean_load: float
    step_max_load: float


def round_robin(num_experts: int, num_devices: int) -> Placement:
    """Expert e on device e modulo the devices: what is done without a history.

    Raises:
        PlanError: a number is below 1.
    """
    if num_experts < 1 or num_devices < 1:
        raise PlanError(
            f"cannot place {num_experts} experts on {num_devices} devices: both must be 1 or more"
        )
    return Placement(
        tuple(tuple(range(device, num_experts, num_devices)) for device in range(num_devices))
    )


def in_order(num_experts: int, num_devices: int) -> Placement:
    """The first experts on the first device and so on, as transformers' expert parallelism has it.

    Raises:
        PlanError: a number is below 1.
    """
    size = -(-num_experts // max(1, num_devices))
    round_robin(num_experts, num_devices)  # for its errors
    return Placement(
        tuple(
            tuple(range(min(num_experts, device * size), min(num_experts, (device + 1) * size)))
            for device in range(num_devices)
        )
    )


def place(
    history: History, num_devices: int, *, num_replicas: int = 0, co_activation: bool = True
) -> Placement:
    """Place the experts of a layer so that the busiest device has as little to do as possible.

    The hottest experts, by load for each copy, get the replicas. Then copies are placed one by
    one, the busiest first, each on a device that has room and not this expert yet: the one with
    the lowest load so far, or, with `co_activation`, with the lowest product of its load and the
    expert's, summed over the steps. That sum is the product of the two mean loads plus their
    covariance, times the steps, so it counts load and being busy together at once. All devices
    have room for the same number: experts and replicas over devices, rounded up. A replica that
    finds no device is left out.

    Never worse than `round_robin` in `max_load` on `history`: where it would be (room can force a
    busy expert onto a busy device), placing by load alone is tried, then round robin.

    Args:
        history: `[steps][experts]` tokens routed to each expert in each step.
        num_devices: devices to place on.
        num_replicas: copies beyond the first, of all experts together, at most.
        co_activation: keep apart what is busy at the same time.

    Raises:
        PlanError: the history is not a table of counts, or a number is out of range.
    """
    loads = _loads(history)  # [steps, experts]
    baseline = round_robin(loads.shape[1], num_devices)
    if num_replicas < 0:
        raise PlanError(f"{num_replicas} replicas were asked for: 0 or more are possible")
    candidates = [_greedy(loads, num_devices, num_replicas, co_activation=co_activation)]
    if co_activation:
        candidates.append(_greedy(loads, num_devices, num_replicas, co_activation=False))
    limit = _balance(baseline, loads).max_load
    for candidate in candidates:
        if _balance(candidate, loads).max_load <= limit:
            return candidate
    return baseline


def measure(placement: Placement, history: History) -> Balance:
    """The loads of devices had the experts of `history` been placed so.

    Raises:
        PlanError: the history is not a table of counts, or not of these experts.
    """
    loads = _loads(history)
    placed = set(placement.num_copies)
    if placed != set(range(loads.shape[1])):
        raise PlanError(
            f"the placement is of {len(placed)} experts and the history of {loads.shape[1]}"
        )
    return _balance(placement, loads)


def _loads(history: History) -> npt.NDArray[np.float64]:
    if not history or not history[0]:
        raise PlanError("the activation history is empty: it needs a step and an expert or more")
    if len({len(step) for step in history}) != 1:
        raise PlanError("the activation history has steps with different numbers of experts")
    try:
        loads = np.asarray(history, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PlanError("the activation history is not made of counts") from error
    if loads.ndim != 2 or not np.isfinite(loads).all() or (loads < 0).any():
        raise PlanError("the activation history is not made of counts of 0 or more")
    return loads


def _balance(placement: Placement, loads: npt.NDArray[np.float64]) -> Balance:
    copies = placement.num_copies
    share = loads / np.array([copies[expert] for expert in range(loads.shape[1])])
    by_step = np.stack(
        [share[:, list(experts)].sum(axis=1) for experts in placement.devices], axis=1
    )  # [steps, devices]
    totals = by_step.sum(axis=0)
    return Balance(
        device_loads=tuple(totals.tolist()),
        max_load=float(totals.max()),
        mean_load=float(totals.mean()),
        step_max_load=float(by_step.max(axis=1).mean()),
    )


def _greedy(
    loads: npt.NDArray[np.float64], num_devices: int, num_replicas: int, *, co_activation: bool
) -> Placement:
    num_steps, num_experts = loads.shape
    totals = loads.sum(axis=0)
    copies = np.ones(num_experts, dtype=np.int64)
    for _ in range(num_replicas):
        per_copy = np.where((copies < num_devices) & (totals > 0), totals / copies, -1.0)
        hottest = int(per_copy.argmax())
        if per_copy[hottest] < 0:
            break
        copies[hottest] += 1
    room = -(-int(copies.sum()) // num_devices)
    share = loads / copies
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    device_loads = np.zeros((num_steps, num_devices))
    order = np.argsort(-totals / copies, kind="stable")
    for expert in np.repeat(order, copies[order]).tolist():
        open_devices = [
            device
            for device, experts in enumerate(devices)
            if len(experts) < room and expert not in experts
        ]
        if not open_devices:
            continue  # a replica: a first copy is on none of the devices, and one has room
        load = device_loads[:, open_devices]
        cost = share[:, expert] @ load if co_activation else load.sum(axis=0)
        # Of devices that cost the same, the one with the lowest load, then with the most room.
        chosen = min(
            zip(cost.tolist(), load.sum(axis=0).tolist(), open_devices, strict=True),
            key=lambda c: (c[0], c[1], len(devices[c[2]])),
        )[2]
        devices[chosen].append(expert)
        device_loads[:, chosen] += share[:, expert]
    return Placement(tuple(tuple(sorted(experts)) for experts in devices))
