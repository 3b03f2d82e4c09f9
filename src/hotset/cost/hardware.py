"""Hardware profiles: capacities and one-way rates of a GPU, its links and its host.

A profile is a JSON file. Each figure carries its source, and each rate is for one direction.
"""

import difflib
import math
import re
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from hotset.cost.json_files import read_json
from hotset.cost.together import Together, together_from_json
from hotset.errors import PlanError
from hotset.foreign_text import parse_json

# Nominal one-way rates, GB/s, of the links `--link` knows by name.
LINKS = {
    "pcie3": ("PCIe 3 x16", 16.0),
    "pcie4": ("PCIe 4 x16", 32.0),
    "pcie5": ("PCIe 5 x16", 64.0),
    "pcie6": ("PCIe 6 x16", 128.0),
    "c2c": ("NVLink-C2C", 450.0),
}

# Figures of a profile in GB, or GB/s, by the field that they fill; and those that count GPUs.
_BYTES = {
    "hbm_gb": "hbm_bytes",
    "hbm_gb_per_s": "hbm_bytes_per_s",
    "peer_gb_per_s": "peer_bytes_per_s",
    "network_gb_per_s": "network_bytes_per_s",
    "host_link_gb_per_s": "host_link_bytes_per_s",
    "host_gb": "host_bytes",
    "host_memory_gb_per_s": "host_memory_bytes_per_s",
    "disk_gb": "disk_bytes",
    "disk_gb_per_s": "disk_bytes_per_s",
}
_COUNTS = ("peer_gpus", "gpus_per_host_link", "gpus_per_host")
_MAY_BE_ZERO = {"host_gb", "disk_gb"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of GPU and what surrounds it. Rates are bytes/s, one way.

    Attributes:
        name: as the user calls it.
        description: for reports.
        hbm_bytes: memory of one GPU.
        hbm_bytes_per_s: its rate.
        flops: dense operations/s by dtype; `bf16` is always there.
        peer_bytes_per_s: from one GPU to the others of its NVLink (or like) domain.
        peer_gpus: GPUs in that domain.
        network_bytes_per_s: from one GPU to beyond the domain.
        host_link: name of the link to host memory.
        host_link_bytes_per_s: its nominal rate.
        gpus_per_host_link: GPUs that share it.
        gpus_per_host: GPUs that share the host's memory and disk.
        host_bytes: memory of a host that tiers may use.
        host_memory_bytes_per_s: what the host's memory delivers to all its GPUs together.
        disk_bytes: disk of a host that tiers may use.
        disk_bytes_per_s: its read rate.
        kernel_s: measured time of one small kernel in a graph, None to use the calibrated one.
        measured: whether `hotset probe` measured the rates (then they are reached, not nominal).
        sources: where each figure comes from.
        together: by a number of GPUs, what they were measured to reach together.
    """

    name: str
    description: str
    hbm_bytes: float
    hbm_bytes_per_s: float
    flops: dict[str, float]
    peer_bytes_per_s: float
    peer_gpus: int
    network_bytes_per_s: float
    host_link: str
    host_link_bytes_per_s: float
    gpus_per_host_link: int
    gpus_per_host: int
    host_bytes: float
    host_memory_bytes_per_s: float
    disk_bytes: float
    disk_bytes_per_s: float
    kernel_s: float | None
    measured: bool
    sources: dict[str, str]
    together: dict[int, Together] = field(default_factory=dict)

    def flops_for(self, dtype: str) -> tuple[str, float]:
        """The dtype that weights of `dtype` are multiplied in here, and its operations/s.

        A format the chip has no units for is widened to bf16 first, as kernels do.
        """
        wanted = {
            "fp16": "bf16",
            "fp8_block": "fp8",
            "nvfp4": "fp4",
            "mxfp4": "fp4",
            "int4": "bf16",
        }.get(dtype, dtype)
        if wanted not in self.flops:
            wanted = "bf16"
        return wanted, self.flops[wanted]

    def with_link(self, link: str) -> "Hardware":
        """The same with another link to host memory: a name of `LINKS`, or GB/s one way."""
        if link in LINKS:
            name, gb_per_s = LINKS[link]
        else:
            try:
                gb_per_s = float(link)
            except ValueError:
                raise PlanError(
                    f"link {link!r} is unknown; use one of {', '.join(LINKS)}, or GB/s one way"
                ) from None
            name = f"link of {gb_per_s:g} GB/s"
        if not (0 < gb_per_s <= 1e5):
            raise PlanError(f"link {link!r} is not a rate; expected above 0 and up to 100000 GB/s")
        return replace(
            self,
            host_link=name,
            host_link_bytes_per_s=gb_per_s * 1e9,
            sources={**self.sources, "host_link_gb_per_s": "given"},
            together={n: replace(t, link_bytes_per_s=None) for n, t in self.together.items()},
        )

    def with_tiers(self, *, host_gib: float | None, disk_gib: float | None) -> "Hardware":
        """The same with other sizes of host memory and disk, for each host; None keeps one."""
        sizes = {"host": host_gib, "disk": disk_gib}
        changes: dict[str, Any] = {}
        sources = dict(self.sources)
        for name, gib in sizes.items():
            if gib is None:
                continue
            if not 0 <= gib <= 1e7:  # also refuses nan
                raise PlanError(f"{name}_gib is {gib:g}; expected 0 to 10000000 GiB")
            changes[f"{name}_bytes"] = gib * 2**30
            sources[f"{name}_gb"] = "given"
        return replace(self, **changes, sources=sources)


def bundled_hardware() -> list[str]:
    """Names of the profiles that come with hotset."""
    folder = resources.files("hotset.cost") / "hardware"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".json"))


def probe_path() -> Path:
    """Where `hotset probe` leaves the profile of this machine."""
    import platformdirs

    return Path(platformdirs.user_data_dir("hotset", appauthor=False)) / "hardware.json"


def load_hardware(name: str) -> Hardware:
    """Load a profile: a bundled name, `this` (what `hotset probe` measured) or a JSON file.

    Raises:
        PlanError: there is none of that name, or the file is not a profile.
    """
    if name == "this":
        path = probe_path()
        if not path.is_file():
            raise PlanError(
                f"this machine has not been measured: {path} is missing; run 'hotset probe' first"
            )
        return _from_file(path)
    normal = re.sub(r"[\s_]+", "-", name.strip().lower())
    if normal in bundled_hardware():
        text = (resources.files("hotset.cost") / "hardware" / f"{normal}.json").read_text("utf-8")
        return hardware_from_json(parse_json(text), normal)
    path = Path(name)
    if path.suffix == ".json" or path.exists():
        return _from_file(path)
    near = difflib.get_close_matches(normal, bundled_hardware(), n=3, cutoff=0.4)
    hint = f"near it: {', '.join(near)}" if near else f"known: {', '.join(bundled_hardware())}"
    raise PlanError(
        f"hardware {name!r} is unknown; {hint}; or give 'this' or a profile's JSON file"
    )


def choose_hardware(name: str | None, gpu_name: str | None) -> Hardware | None:
    """The profile to predict with.

    Without a name: what `hotset probe` measured here, else the bundled profile of this GPU; None
    where there is neither, so that nothing is predicted by the rates of another one.

    Raises:
        PlanError: there is no profile of that name.
    """
    if name is not None:
        return load_hardware(name)
    if probe_path().is_file():
        measured = load_hardware("this")
        if ("CPU" in measured.description) == (gpu_name is None):
            return measured
    words = set((gpu_name or "").lower().replace("-", " ").split())
    if "mig" in words:  # a part of a GPU, with a part of its rates
        return None
    for known in bundled_hardware():
        if set(known.split("-")) - {"sxm"} <= words:
            return load_hardware(known)
    return None


def nearest_hardware(memory_bytes_per_s: float) -> Hardware:
    """The bundled profile with the nearest rate of memory, by ratio."""

    def distance(hardware: Hardware) -> float:
        return abs(math.log(hardware.hbm_bytes_per_s / memory_bytes_per_s))

    return min(map(load_hardware, bundled_hardware()), key=distance)


def _from_file(path: Path) -> Hardware:
    return hardware_from_json(read_json(path, "hardware profile"), str(path))


@dataclass(frozen=True, slots=True)
class _Figures:
    """Reads the figures of a profile, and notes the source of each."""

    origin: str
    sources: dict[str, str]

    def value(self, name: str, holder: dict[str, Any], label: str) -> Any:
        """What a figure says, of whatever type."""
        entry = holder.get(name)
        if not isinstance(entry, dict) or "value" not in entry:
            raise PlanError(
                f'hardware profile {self.origin} lacks "{label}": {{"value", "source"}}'
            )
        if not isinstance(entry.get("source"), str) or not entry["source"].strip():
            raise PlanError(f"hardware profile {self.origin}: figure {label} names no source")
        self.sources[label] = entry["source"]
        return entry["value"]

    def number(self, name: str, holder: dict[str, Any], label: str) -> float:
        """A number above 0, or 0 where that makes sense."""
        value = self.value(name, holder, label)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not ok
            or not math.isfinite(value)
            or value < 0
            or (not value and name not in _MAY_BE_ZERO)
        ):
            raise PlanError(
                f"hardware profile {self.origin}: {label} is {value!r}; expected a number above 0"
            )
        return float(value)


def hardware_from_json(data: Any, origin: str) -> Hardware:
    """Check a parsed profile and build the `Hardware` it describes.

    Raises:
        PlanError: a figure is missing, has no source or is absurd.
    """
    figures = data.get("figures") if isinstance(data, dict) else None
    if not isinstance(figures, dict):
        raise PlanError(f"hardware profile {origin} has no 'figures'; take a bundled one as model")
    read = _Figures(origin, {})
    sizes: dict[str, Any] = {
        field: read.number(name, figures, name) * 1e9 for name, field in _BYTES.items()
    }
    sizes |= {name: max(1, int(read.number(name, figures, name))) for name in _COUNTS}
    rates = figures.get("tflops")
    if not isinstance(rates, dict) or "bf16" not in rates:
        raise PlanError(f"hardware profile {origin} lacks tflops of bf16")
    has_kernel = "kernel_us" in figures
    return Hardware(
        name=str(data.get("name", origin)),
        description=str(data.get("description", "")),
        flops={name: read.number(name, rates, f"tflops.{name}") * 1e12 for name in rates},
        host_link=str(read.value("host_link", figures, "host_link")),
        kernel_s=read.number("kernel_us", figures, "kernel_us") * 1e-6 if has_kernel else None,
        measured=bool(data.get("measured", False)),
        sources=read.sources,
        together=together_from_json(data.get("together", {}), origin),
        **sizes,
    )
