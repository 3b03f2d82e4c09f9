"""From option text to a `Request`: counts like 128k, and one flat set of options a case."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.hardware import LINKS, load_hardware
from hotset.cost.layout import parse_layout
from hotset.cost.routing import Routing, load_histogram
from hotset.errors import PlanError
from hotset.plan.workload import Request, Workload

_SUFFIX = {"": 1, "k": 1024, "m": 1024**2}
OVERLAPS = ("comm", "stream")


def parse_count(text: str, name: str) -> int:
    """Read a whole number of 1 or more; `k` is 1024 and `m` 1024 squared, as for contexts."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", text)
    value = float(match[1]) * _SUFFIX[match[2].lower()] if match else 0.0
    if not match or value != int(value) or value < 1:
        raise PlanError(f"{name} is {text!r}; expected a whole number of 1 or more, like 512 or 8k")
    return int(value)


@dataclass(frozen=True)
class Options:
    """What the command line says of one case, unparsed where `--compare` may replace it."""

    model: str
    hardware: str = "h100-sxm"
    gpus: int | None = None
    layout: str | None = None
    users: str = "256"
    context: str = "4k"
    output: str | None = None
    reuse: float | None = None
    turns: int = 1
    hbm_gb: float | None = None
    host_gb: float | None = None
    disk_gb: float | None = None
    weights: str | None = None
    kv: str = "bf16"
    link: str | None = None
    resident_experts: int | None = None
    hold_windows: bool = True
    overlap: str = "none"
    engine: str = "published"
    expert_histogram: Path | None = None

    def request(self) -> Request:
        """Load what is named and check what is given.

        Raises:
            PlanError: an option makes no sense, or names something unknown.
        """
        for name in ("hbm_gb", "host_gb", "disk_gb", "reuse"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise PlanError(f"--{name.replace('_', '-')} is {value}; expected a number")
        shape = load_model(self.model, self.weights)
        hardware = load_hardware(self.hardware)
        if self.link is not None:
            hardware = hardware.with_link(self.link)
        # A disk is used only where asked for: it wears, and few leave terabytes of it to a cache.
        hardware = hardware.with_sizes(self.hbm_gb, self.host_gb, self.disk_gb or 0.0)
        overlap = frozenset() if self.overlap == "none" else frozenset(self.overlap.split("+"))
        if not overlap <= set(OVERLAPS):
            raise PlanError(f"--overlap is {self.overlap!r}; use none, comm, stream or comm+stream")
        if self.engine not in CALIBRATIONS:
            raise PlanError(
                f"--engine is {self.engine!r}; expected one of {', '.join(CALIBRATIONS)}"
            )
        workload = Workload(
            users=parse_count(self.users, "--users"),
            context=parse_count(self.context, "--context"),
            output=None if self.output is None else parse_count(self.output, "--output"),
            reuse=self.reuse,
            turns=self.turns,
        )
        histogram = self.expert_histogram
        return Request(
            shape=shape,
            hardware=hardware,
            workload=workload,
            layout=None if self.layout is None else parse_layout(self.layout),
            gpus=self.gpus,
            kv_dtype=self.kv,
            host_given=self.host_gb is not None,
            resident_experts=self.resident_experts,
            hold_windows=self.hold_windows,
            overlap=overlap,
            routing=Routing() if histogram is None else load_histogram(histogram),
            calibration=CALIBRATIONS[self.engine],
        )


_NUMBERS = ("gpus", "turns", "resident_experts")
_FLOATS = ("reuse", "hbm_gb", "host_gb", "disk_gb")
_TEXTS = ("hardware", "users", "context", "output", "weights", "kv", "link", "overlap", "engine")


def split_cases(values: tuple[str, ...]) -> list[str]:
    """The cases of one or more `--compare`: apart by `;`, `|`, ` vs ` or white space."""
    cases = []
    for value in values:
        cases += [c for c in re.split(r"\s*[;|]\s*|\s+vs\s+|\s+", value.strip()) if c]
    return cases


def options_of_case(base: Options, case: str) -> Options:
    """`base` with what a case of `--compare` changes.

    A case is a comma-separated list: `tp=8`, `dp=8,ep=8`, `pcie5`, `link=c2c`, `host-gb=512`,
    `layout=tp=8`, `kv=fp8,users=64`, and so on.

    Raises:
        PlanError: it names something that is not an option of a case.
    """
    layout: list[str] = []
    changes: dict[str, Any] = {}
    for part in case.replace("layout=", "").split(","):
        key, _, value = (p.strip() for p in part.partition("="))
        key = key.lower().lstrip("-").replace("-", "_")
        if key in ("tp", "dp", "ep"):
            layout.append(f"{key}={value}")
        elif not value and key in LINKS:
            changes["link"] = key
        elif value and key in _TEXTS:
            changes[key] = value
        elif value and (key in _NUMBERS or key in _FLOATS):
            try:
                changes[key] = int(value) if key in _NUMBERS else float(value)
            except ValueError:
                raise PlanError(f"--compare {case!r}: {key} is {value!r}, not a number") from None
        else:
            raise PlanError(
                f"--compare {case!r}: {part!r} is not a part of a case; use tp, dp, ep, a link "
                f"({', '.join(LINKS)}), or "
                f"{', '.join(k.replace('_', '-') for k in (*_TEXTS, *_FLOATS, *_NUMBERS))}"
            )
    if layout:
        changes["layout"] = ",".join(layout)
    return replace(base, **changes)
