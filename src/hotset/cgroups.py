"""What this process may take of the machine: memory and CPUs, within the limits of its cgroups.

A limit holds for all processes of a cgroup together, and each parent may have one of its own. So
the answer is the least over the process's own cgroup and its parents, in version 2 and in the
controllers of version 1, which a machine may have side by side.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


@dataclass(frozen=True, slots=True)
class _Names:
    """Files of a memory cgroup. v1 counts a cgroup's children in `total_` figures only."""

    limits: tuple[str, ...]
    used: str
    stat_prefix: str


# Above `memory.high` the kernel makes a process wait at each allocation: as good as a limit.
_MEMORY_V2 = _Names(("memory.max", "memory.high"), "memory.current", "")
_MEMORY_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")


def available_host_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken now, without swap: of the machine, within all cgroups' limits.

    A file that was read stays in memory as cache and counts as used by its cgroup. The kernel
    gives it back before it lets an allocation fail, so it is counted as free here, whether read
    once (`inactive_file`) or more often (`active_file`). Mapped files are not counted as free:
    code, and weights that are computed with from there, would be read again from disk.

    Args:
        root: under which `proc` and `sys` are found; for tests.
    """
    available: int = psutil.virtual_memory().available
    for folder, names in _memory_folders(root):
        used = _number(folder / names.used)
        for limit in (_number(folder / name) for name in names.limits):
            if limit is not None and used is not None:
                reclaimable = _reclaimable_bytes(folder, names.stat_prefix)
                available = min(available, limit - used + reclaimable)
    return max(0, available)


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Memory this process may use, taken or not: the machine's, or the least limit of a cgroup."""
    limits = [
        _number(folder / name) for folder, names in _memory_folders(root) for name in names.limits
    ]
    total: int = psutil.virtual_memory().total
    return min([total, *(limit for limit in limits if limit is not None)])


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs this process can keep busy: those it may run on, or whole ones of the least quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus: int = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for folder in _folders(root, ""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cpus = min(cpus, int(quota) // int(period))
    for folder in _folders(root, "cpu"):
        quota_us = _number(folder / "cpu.cfs_quota_us")  # -1, so None, is without a limit
        period_us = _number(folder / "cpu.cfs_period_us")
        if quota_us and period_us:
            cpus = min(cpus, quota_us // period_us)
    return max(1, cpus)


def _memory_folders(root: Path) -> Iterator[tuple[Path, _Names]]:
    for controller, names in (("", _MEMORY_V2), ("memory", _MEMORY_V1)):
        for folder in _folders(root, controller):
            yield folder, names


def _reclaimable_bytes(folder: Path, prefix: str) -> int:
    words = _text(folder / "memory.stat").split()
    stat = dict(zip(words[::2], words[1::2], strict=False))

    def value(name: str) -> int:
        text = stat.get(prefix + name, "0")
        return int(text) if text.isdigit() else 0

    # Mapped pages of shared memory are among the mapped ones, but not among the files' pages.
    mapped = max(0, value("mapped_file" if prefix else "file_mapped") - value("shmem"))
    return max(0, value("inactive_file") + value("active_file") - mapped)


def _folders(root: Path, controller: str) -> list[Path]:
    """The process's cgroup and its parents, as far as they are to be seen here.

    Args:
        root: see `available_host_bytes`.
        controller: of version 1; empty for version 2.
    """
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller not in controllers.split(","):
            continue
        # In version 2 alone the tree is the folder itself, beside version 1 often `unified`.
        for name in dict.fromkeys([controllers, controller] if controller else ["", "unified"]):
            mount = root / "sys/fs/cgroup" / name
            below = _path_below(root, mount, PurePosixPath(path))
            found += [mount / part for part in (below, *below.parents)]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _path_below(root: Path, mount: Path, path: PurePosixPath) -> PurePosixPath:
    """A cgroup's path within `mount`, which in a container may show a part of the tree only."""
    shown = PurePosixPath("/")
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields = line.split(" ")
        if len(fields) > 4 and root / fields[4].lstrip("/") == mount:
            shown = PurePosixPath(fields[3])
    if path.is_relative_to(shown) and ".." not in path.parts:
        return path.relative_to(shown)
    return PurePosixPath()  # the process is outside of what is shown


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or it says `max`."""
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    """What a file says; empty where it cannot be read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
