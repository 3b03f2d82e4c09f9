"""What `hotset plan` is asked: its flags, from text to a `Request`.

What the engine may use is named as `hotset serve` names it, the work as `hotset bench` does.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.catalog import load_model
from hotset.cost.hardware import LINKS, load_hardware
from hotset.cost.hot_set import Misses
from hotset.cost.routing import Routing, load_histogram
from hotset.cost.selection import GUESSED, DrawnSelections
from hotset.errors import PlanError
from hotset.layout import WORDS, parse_layout
from hotset.option_fields import option, options_of
from hotset.plan.search import Target
from hotset.plan.workload import Request, Workload

GIB = 2**30
OVERLAPS = ("comm", "stream")
_OF_INDEXERS = (
    *("index_dtype", "selection", "selection_overlap", "selection_guessed", "tpot_ms"),
    "row_prefetch",
)
# `hotset serve`'s names first, then formats that can be planned and not served.
_PLAIN = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DTYPES = {"auto": None, **_PLAIN, **{n: n for n in ("fp8", "int8", "int4", "mxfp4", "nvfp4")}}
KV_DTYPES = {"auto": None, "fp8": "fp8", **_PLAIN, "int8": "int8", "fp8_ds_mla": "fp8_ds_mla"}

_SUFFIX = {"": 1, "k": 1024, "m": 1024**2}


def parse_count(text: str, name: str) -> int:
    """Read a whole number of 1 or more; `k` is 1024 and `m` 1024 squared, as for contexts."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", text)
    value = float(match[1]) * _SUFFIX[match[2].lower()] if match else 0.0
    if not match or value != int(value) or value < 1:
        raise PlanError(f"{name} is {text!r}; expected a whole number of 1 or more, like 512 or 8k")
    return int(value)


def _known(choices: dict[str, str | None], value: str, name: str) -> str | None:
    if value not in choices:
        raise PlanError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    return choices[value]


@dataclass(frozen=True)
class Options:
    """What the command line says of one case, unparsed where `--compare` may replace it."""

    model: str = option("", "What is planned.", has_flag=False)
    hardware: str = option(
        "h100-sxm",
        "A bundled profile, a profile's JSON file, or what 'hotset probe' measured.",
        metavar="NAME|FILE|this",
    )
    gpus: int | None = option(None, "GPUs to use.", otherwise="those of the layout, or the fewest")
    layout: str | None = option(
        None,
        "For example tp=8, dp=8,ep=8 or dp=2,es=2: tp shares attention, dp has groups of users, ep "
        "spreads experts whole and es cuts each.",
        metavar="SIZES",
    )
    users: str = option("256", "Users who want tokens at the same time.", metavar="N")
    context: str = option(
        "4k",
        "Tokens that each user has at the end, prompts and answers; k is 1024.",
        flag="--max-model-len",
        metavar="TOKENS",
    )
    output: str | None = option(
        None,
        "Tokens of an answer. Adds the prefill of turns to the steps; without it the plan is of "
        "decode alone.",
        flag="--output-tokens",
        metavar="TOKENS",
    )
    reuse: float | None = option(
        None,
        "Share, 0 to 1, of the prompt (with --turns: of the earlier turns) that is found in a "
        "tier.",
        metavar="SHARE",
    )
    turns: int = option(1, "Turns of a conversation.")
    hot_gib: float | None = option(
        None,
        "Memory of each GPU for KV, in GiB; of an MoE model for KV and experts together, unless "
        "--expert-slots sizes those.",
        otherwise="what weights and workspace leave",
    )
    total_gib: float | None = option(
        None,
        "Memory of each GPU for weights, experts, KV and workspace, in GiB. Instead of --hot-gib.",
        otherwise="90 % of it",
    )
    host_gib: float | None = option(
        None,
        "Host memory for KV and for experts that are not resident, in GiB per host.",
        otherwise="the profile's",
    )
    disk_gib: float | None = option(None, "Disk for the same, in GiB per host.", otherwise="none")
    dtype: str = option(
        "auto",
        f"Store weights as {', '.join(DTYPES)}; auto is as the checkpoint does.",
        metavar="DTYPE",
    )
    kv_dtype: str = option(
        "auto",
        f"Store KV as {', '.join(KV_DTYPES)}; auto is as wide as what is not quantised.",
        metavar="DTYPE",
    )
    index_dtype: str = option(
        "auto",
        "Store the keys of an indexer as auto, the dtype of what is not quantised, or fp8.",
        metavar="DTYPE",
    )
    selection_overlap: float | None = option(
        None,
        "Of a model that selects tokens: share of a selection, 0 to 1, that the next step's has as "
        "well.",
        otherwise="0.4",
        metavar="SHARE",
    )
    selection: str | None = option(
        None,
        "Selections recorded by 'hotset bench --record-selection', instead of their overlap.",
        metavar="FILE",
    )
    tpot_ms: float | None = option(
        None, "Longest step with hot requests, in ms: bounds how many turn hot.", otherwise="any"
    )
    row_prefetch: int = option(
        0,
        "Rows of hot requests that are fetched early: 0 none, 1 those of layers that share a "
        "selection, 2 the next layer's too.",
        metavar="0|1|2",
    )
    selection_guessed: float = option(
        GUESSED,
        "With row_prefetch 2: share of a selection, 0 to 1, that is guessed a layer ahead.",
        metavar="SHARE",
    )
    link: str | None = option(
        None, "Host link: pcie3 to pcie6, c2c, or GB/s one way.", metavar="NAME|GB/s"
    )
    expert_slots: int | None = option(
        None, "Experts that each layer keeps on the device.", otherwise="solved for", metavar="N"
    )
    overlap: str = option(
        "none",
        "What is hidden behind compute: none, comm, stream or comm+stream.",
        metavar="WHAT",
    )
    engine: str = option(
        "hotset",
        "Whose overheads and KV: hotset (this one, measured) or published (engines in general).",
        metavar="NAME",
    )
    expert_histogram: str | None = option(
        None,
        "JSON list of the tokens that each expert got.",
        otherwise="uniform routing",
        metavar="FILE",
    )
    free_windows: bool = option(
        False, "Free what a sliding window has left behind, as some engines do."
    )
    stream_kv: bool = option(
        False, "Let steps read KV from host memory over the link, for links that are fast."
    )

    def request(self) -> Request:
        """Load what is named and check what is given.

        Raises:
            PlanError: an option makes no sense, or names something unknown.
        """
        for one in FIELDS.values():
            value = getattr(self, one.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise PlanError(f"{one.name} is {value}; expected a number")
        shape = load_model(self.model, _known(DTYPES, self.dtype, "dtype"))
        hardware = load_hardware(self.hardware)
        if self.link is not None:
            hardware = hardware.with_link(self.link)
        # A disk is used only where asked for: it wears, and few leave terabytes of it to a cache.
        hardware = hardware.with_tiers(host_gib=self.host_gib, disk_gib=self.disk_gib or 0.0)
        overlap = frozenset() if self.overlap == "none" else frozenset(self.overlap.split("+"))
        if not overlap <= set(OVERLAPS):
            raise PlanError(f"overlap is {self.overlap!r}; use none, comm, stream or comm+stream")
        if self.engine not in CALIBRATIONS:
            raise PlanError(f"engine is {self.engine!r}; expected one of {', '.join(CALIBRATIONS)}")
        if self.engine == "hotset" and not self.free_windows:
            shape = shape.stored
        for name in _OF_INDEXERS:
            if getattr(self, name) != FIELDS[name].default and not shape.index_bytes_per_token:
                raise PlanError(
                    f"{name} is given, but {shape.name} has no indexer that selects tokens, and so "
                    "no hot set; leave it out"
                )
        if self.index_dtype not in ("auto", "fp8"):
            raise PlanError(f"index_dtype is {self.index_dtype!r}; expected auto or fp8")
        histogram = self.expert_histogram
        return Request(
            shape=replace(shape, index_dtype=self.index_dtype),
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
            routing=Routing() if histogram is None else load_histogram(Path(histogram)),
            calibration=CALIBRATIONS[self.engine],
            selections=self._selections(),
            tpot_s=None if self.tpot_ms is None else self.tpot_ms / 1e3,
            row_prefetch=self.row_prefetch,
            selection_guessed=self.selection_guessed,
        )

    def _selections(self) -> Misses:
        overlap = self.selection_overlap
        if self.selection is None:
            return DrawnSelections() if overlap is None else DrawnSelections(overlap)
        if overlap is not None:
            raise PlanError("selection and selection_overlap are both given; give one of them")
        from hotset.plan.selection_file import load_selections  # imports numpy

        return load_selections(Path(self.selection))

    def _workload(self) -> Workload:
        answer = self.output
        return Workload(
            users=parse_count(self.users, "users"),
            context=parse_count(self.context, "context"),
            output=None if answer is None else parse_count(answer, "output"),
            reuse=self.reuse,
            turns=self.turns,
        )


FIELDS = {one.name: one for one in options_of(Options)}
# What a case of `--compare` may change, by flag.
_IN_CASES = {
    one.flags[0][2:]: one
    for one in FIELDS.values()
    if one.flags and one.kind is not bool and one.name not in ("layout", "expert_histogram")
}


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
        key = key.lower().lstrip("-").replace("_", "-")
        one = _IN_CASES.get(key)
        if key in WORDS:
            layout.append(f"{key}={value}")
        elif not value and key in LINKS:
            changes["link"] = key
        elif value and one is not None:
            try:
                changes[one.name] = one.kind(value)
            except ValueError:
                raise PlanError(f"--compare {case!r}: {key} is {value!r}, not a number") from None
        else:
            raise PlanError(
                f"--compare {case!r}: {part!r} is not a part of a case; use "
                f"{', '.join(WORDS)}, a link ({', '.join(LINKS)}), or {', '.join(_IN_CASES)}"
            )
    if layout:
        changes["layout"] = ",".join(layout)
    return replace(base, **changes)


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """Read `users=1:1024` or `max-model-len=1k:128k`: the field, and values that double.

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
    field = "users" if match[1] == "users" else "context"
    return field, values if values[-1] == last else [*values, last]


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
