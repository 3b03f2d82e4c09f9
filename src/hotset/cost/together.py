"""What several GPUs of one host reach together: collectives by size, and host links all at once.

Imports no torch.
"""

from dataclasses import dataclass
from typing import Any

from hotset.cost.points import Point
from hotset.errors import PlanError

_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True, slots=True)
class Together:
    """Measured on a number of GPUs that work at the same time.

    Attributes:
        source: where the figures come from.
        link_bytes_per_s: from host memory to each GPU while all copy; None was not measured.
        all_reduce: seconds by bytes of the message, ascending.
        all_gather: seconds by the bytes that each GPU brings, ascending.
        reduce_scatter: seconds by the bytes that each GPU gets, ascending.
    """

    source: str
    link_bytes_per_s: float | None = None
    all_reduce: tuple[Point, ...] = ()
    all_gather: tuple[Point, ...] = ()
    reduce_scatter: tuple[Point, ...] = ()


def together_from_json(data: Any, origin: str) -> dict[int, Together]:
    """Read the part `together` of a profile: by the number of GPUs.

    It looks like `{"2": {"source": "...", "host_link_gb_per_s": 53.9, "all_reduce_us": {"8192":
    6.6}}}`; `all_gather_us` and `reduce_scatter_us` are alike.

    Raises:
        PlanError: it looks otherwise.
    """
    if not isinstance(data, dict):
        raise PlanError(f"hardware profile {origin}: together is not an object by number of GPUs")
    return {_count(gpus, origin): _together(part, origin, gpus) for gpus, part in data.items()}


def _count(text: str, origin: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise PlanError(
            f"hardware profile {origin}: together has {text!r}; expected a number of GPUs from 2 on"
        )
    return int(text)


def _together(part: Any, origin: str, gpus: str) -> Together:
    label = f"hardware profile {origin}: together.{gpus}"
    if not isinstance(part, dict) or not isinstance(part.get("source"), str):
        raise PlanError(f"{label} names no source")
    rate = part.get("host_link_gb_per_s")
    points = {
        name: tuple(
            sorted(
                (_bytes(size, label), _positive(us, f"{label}.{name}_us") * 1e-6)
                for size, us in part.get(f"{name}_us", {}).items()
            )
        )
        for name in _COLLECTIVES
    }
    return Together(
        source=part["source"],
        link_bytes_per_s=None
        if rate is None
        else _positive(rate, f"{label}.host_link_gb_per_s") * 1e9,
        **points,
    )


def _bytes(text: str, label: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise PlanError(f"{label} has a size of {text!r}; expected bytes")
    return int(text)


def _positive(value: Any, label: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise PlanError(f"{label} is {value!r}; expected a number above 0")
    return float(value)
