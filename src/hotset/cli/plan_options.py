"""What `hotset plan` is asked: its flags, from text to a `Request`, and errors that name them.

What the engine may use is named as `hotset serve` names it, the work as `hotset bench` does.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.hardware import LINKS, load_hardware
from hotset.cost.layout import parse_layout
from hotset.cost.routing import Routing, load_histogram
from hotset.errors import PlanError
from hotset.plan.search import Target
from hotset.plan.workload import Request, Workload

GIB = 2**30
OVERLAPS = ("comm", "stream")
# `hotset serve`'s names first, then formats that can be planned and not served.
_PLAIN = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DTYPES = {"auto": None, **_PLAIN, **{n: n for n in ("fp8", "int8", "int4", "mxfp4", "nvfp4")}}
KV_DTYPES = {"auto": None, "fp8": "fp8", **_PLAIN, "int8": "int8", "fp8_ds_mla": "fp8_ds_mla"}

_SUFFIX = {"": 1, "k": 1024, "m": 1024**2}
# Fields of the library whose flags have another name.
_FLAGS = {"context": "max_model_len", "output": "output_tokens"}


def flag_of(field: str) -> str:
    """The flag that sets a field of a `Request`, as it is typed."""
    return "--" + _FLAGS.get(field, field).replace("_", "-")


@contextmanager
def naming_flags() -> Iterator[None]:
    """Let an error that is about a field name the flag that was typed."""
    try:
        yield
    except PlanError as error:
        if error.field is None or error.field.startswith("--"):
            raise
        raise PlanError(error.problem, field=flag_of(error.field)) from error


def parse_count(text: str, flag: str) -> int:
    """Read a whole number of 1 or more; `k` is 1024 and `m` 1024 squared, as for contexts."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", text)
    value = float(match[1]) * _SUFFIX[match[2].lower()] if match else 0.0
    if not match or value != int(value) or value < 1:
        raise PlanError(
            f"is {text!r}; expected a whole number of 1 or more, like 512 or 8k", field=flag
        )
    return int(value)


def _known(choices: dict[str, str | None], name: str, flag: str) -> str | None:
    if name not in choices:
        raise PlanError(f"is {name!r}; expected one of {', '.join(choices)}", field=flag)
    return choices[name]


@dataclass(frozen=True)
class Options:
    """What the command line says of one case, unparsed where `--compare` may replace it."""

    model: str
    hardware: str = "h100-sxm"
    gpus: int | None = None
    layout: str | None = None
    users: str = "256"
    max_model_len: str = "4k"
    output_tokens: str | None = None
    reuse: float | None = None
    turns: int = 1
    hot_gib: float | None = None
    total_gib: float | None = None
    host_gib: float | None = None
    disk_gib: float | None = None
    dtype: str = "auto"
    kv_dtype: str = "auto"
    link: str | None = None
    expert_slots: int | None = None
    free_windows: bool = False
    stream_kv: bool = False
    overlap: str = "none"
    engine: str = "hotset"
    expert_histogram: Path | None = None

    def request(self) -> Request:
        """Load what is named and check what is given.

        Raises:
            PlanError: an option makes no sense, or names something unknown.
        """
        with naming_flags():
            return self._request()

    def _request(self) -> Request:
        for name in _FLOATS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise PlanError(f"is {value}; expected a number", field=name)
        shape = load_model(self.model, _known(DTYPES, self.dtype, "dtype"))
        hardware = load_hardware(self.hardware)
        if self.link is not None:
            hardware = hardware.with_link(self.link)
        # A disk is used only where asked for: it wears, and few leave terabytes of it to a cache.
        hardware = hardware.with_tiers(host_gib=self.host_gib, disk_gib=self.disk_gib or 0.0)
        overlap = frozenset() if self.overlap == "none" else frozenset(self.overlap.split("+"))
        if not overlap <= set(OVERLAPS):
            raise PlanError(
                f"is {self.overlap!r}; use none, comm, stream or comm+stream", field="overlap"
            )
        if self.engine not in CALIBRATIONS:
            raise PlanError(
                f"is {self.engine!r}; expected one of {', '.join(CALIBRATIONS)}", field="engine"
            )
        if self.engine == "hotset" and not self.free_windows:
            shape = shape.stored
        histogram = self.expert_histogram
        return Request(
            shape=shape,
            hardware=hardware,
            workload=self._workload(),
            layout=None if self.layout is None else parse_layout(self.layout),
            gpus=self.gpus,
            kv_dtype=_known(KV_DTYPES, self.kv_dtype, "kv_dtype") or shape.plain_dtype,
            host_given=self.host_gib is not None,
            total_bytes=None if self.total_gib is None else self.total_gib * GIB,
            hot_bytes=None if self.hot_gib is None else self.hot_gib * GIB,
            expert_slots=self.expert_slots,
            free_windows=self.free_windows,
            stream_kv=self.stream_kv,
            overlap=overlap,
            routing=Routing() if histogram is None else load_histogram(histogram),
            calibration=CALIBRATIONS[self.engine],
        )

    def _workload(self) -> Workload:
        answer = self.output_tokens
        return Workload(
            users=parse_count(self.users, "users"),
            context=parse_count(self.max_model_len, "max_model_len"),
            output=None if answer is None else parse_count(answer, "output_tokens"),
            reuse=self.reuse,
            turns=self.turns,
        )


_NUMBERS = ("gpus", "turns", "expert_slots")
_FLOATS = ("reuse", "hot_gib", "total_gib", "host_gib", "disk_gib")
_TEXTS = (
    *("hardware", "users", "max_model_len", "output_tokens", "dtype", "kv_dtype"),
    *("link", "overlap", "engine"),
)


def split_cases(values: tuple[str, ...]) -> list[str]:
    """The cases of one or more `--compare`: apart by `;`, `|`, ` vs ` or white space."""
    cases = []
    for value in values:
        cases += [c for c in re.split(r"\s*[;|]\s*|\s+vs\s+|\s+", value.strip()) if c]
    return cases


def options_of_case(base: Options, case: str) -> Options:
    """`base` with what a case of `--compare` changes.

    A case is a comma-separated list: `tp=8`, `dp=8,ep=8`, `pcie5`, `link=c2c`, `host-gib=512`,
    `layout=tp=8`, `kv-dtype=fp8,users=64`, and so on.

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
            known = ", ".join(name.replace("_", "-") for name in (*_TEXTS, *_FLOATS, *_NUMBERS))
            raise PlanError(
                f"--compare {case!r}: {part!r} is not a part of a case; use tp, dp, ep, a link "
                f"({', '.join(LINKS)}), or {known}"
            )
    if layout:
        changes["layout"] = ",".join(layout)
    return replace(base, **changes)


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """Read `users=1:1024` or `max-model-len=1k:128k`: the option, and values that double.

    Raises:
        PlanError: it says something else.
    """
    match = re.fullmatch(r"(users|max-model-len)=([^:]+):([^:]+)", text.replace(" ", ""))
    if not match:
        raise PlanError(f"--sweep is {text!r}; expected users=1:1024 or max-model-len=1k:128k")
    first, last = parse_count(match[2], "--sweep"), parse_count(match[3], "--sweep")
    if first > last:
        raise PlanError(f"--sweep {text}: {first} is above {last}")
    values = [first]
    while values[-1] * 2 < last:
        values.append(values[-1] * 2)
    return match[1].replace("-", "_"), values if values[-1] == last else [*values, last]


def parse_target(text: str) -> Target:
    """Read `ttft=2s,tpot=50ms`, either or both; a bare number is seconds.

    Raises:
        PlanError: it says something else.
    """
    found: dict[str, float] = {}
    for part in text.replace(" ", "").lower().split(","):
        match = re.fullmatch(r"(ttft|tpot)[=<:](\d+(?:\.\d+)?)(ms|s|)", part)
        if not match or match[1] in found or float(match[2]) <= 0:
            raise PlanError(f"--find is {text!r}; expected for example ttft=2s,tpot=50ms")
        found[match[1]] = float(match[2]) * (1e-3 if match[3] == "ms" else 1.0)
    return Target(found.get("ttft"), found.get("tpot"))
