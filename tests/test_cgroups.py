"""Limits of made cgroup trees: version 2, version 1, both, nested, none."""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from hotset import cgroups

GIB = 2**30
MACHINE = 64 * GIB  # far above every limit below


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = MACHINE
        total = 2 * MACHINE

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def make_tree(
    root: Path,
    lines: str,
    folders: Mapping[str, Mapping[str, object]],
    mounts: Mapping[str, str] | None = None,
) -> Path:
    """A root folder with `/proc/self` and `/sys/fs/cgroup`.

    Args:
        root: where.
        lines: of `/proc/self/cgroup`.
        folders: by path below `/sys/fs/cgroup`, what its files say.
        mounts: by mount point, which part of the hierarchy it shows.
    """
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(lines)
    (proc / "mountinfo").write_text(
        "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
        + "".join(
            f"35 31 0:32 {shown} {point} rw,relatime - cgroup cgroup rw\n"
            for point, shown in (mounts or {}).items()
        )
    )
    (root / "sys/fs/cgroup").mkdir(parents=True)
    for name, files in folders.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, says in files.items():
            (folder / file).write_text(f"{says}\n")
    return root


def v2(limit: object, current: int, **stat: int) -> dict[str, object]:
    return {
        "memory.max": limit,
        "memory.current": current,
        "memory.stat": "\n".join(f"{name} {value}" for name, value in stat.items()),
    }


def v1(limit: int, usage: int, **stat: int) -> dict[str, object]:
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": usage,
        "memory.stat": "\n".join(f"{name} {value}" for name, value in stat.items()),
    }


def test_page_cache_counts_as_free(tmp_path: Path) -> None:
    top = v2(8 * GIB, 7 * GIB + GIB // 2, anon=GIB // 2, inactive_file=6 * GIB, active_file=GIB)
    root = make_tree(tmp_path, "0::/\n", {".": top})

    assert cgroups.available_host_bytes(root) == 7 * GIB + GIB // 2
    assert cgroups.memory_limit_bytes(root) == 8 * GIB


def test_mapped_files_and_shared_memory_are_in_use(tmp_path: Path) -> None:
    # 3 GiB of 5 in files are mapped, 1 GiB of shared memory is mapped too: not a file's page.
    top = v2(8 * GIB, 7 * GIB, inactive_file=5 * GIB, file_mapped=4 * GIB, shmem=GIB)
    root = make_tree(tmp_path, "0::/\n", {".": top})

    assert cgroups.available_host_bytes(root) == 3 * GIB


@pytest.mark.parametrize("limited", ["a.slice", "a.slice/b.scope"])
def test_the_least_of_a_cgroup_and_its_parents_counts(tmp_path: Path, limited: str) -> None:
    folders = {
        ".": v2("max", 30 * GIB),
        "a.slice": v2("max", 2 * GIB),
        "a.slice/b.scope": v2(20 * GIB, 1 * GIB),
        "other.scope": v2(GIB, 1),
        limited: v2(3 * GIB, GIB),
    }
    root = make_tree(tmp_path, "0::/a.slice/b.scope\n", folders)

    assert cgroups.available_host_bytes(root) == 2 * GIB
    assert cgroups.memory_limit_bytes(root) == 3 * GIB


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    top = v2(8 * GIB, GIB) | {"memory.high": 4 * GIB}
    root = make_tree(tmp_path, "0::/\n", {".": top})

    assert cgroups.available_host_bytes(root) == 3 * GIB


def test_max_and_no_cgroups_leave_the_machine(tmp_path: Path) -> None:
    no_limit = make_tree(tmp_path / "max", "0::/\n", {".": v2("max", 30 * GIB)})
    assert cgroups.available_host_bytes(no_limit) == MACHINE
    assert cgroups.memory_limit_bytes(no_limit) == 2 * MACHINE

    (tmp_path / "none").mkdir()
    assert cgroups.available_host_bytes(tmp_path / "none") == MACHINE
    assert cgroups.usable_cpus(tmp_path / "none") == 16


def test_less_free_on_the_machine_than_in_the_cgroup_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_tree(tmp_path, "0::/\n", {".": v2(8 * GIB, GIB)})
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": GIB, "total": 9 * GIB})
    )

    assert cgroups.available_host_bytes(root) == GIB


def test_a_cgroup_that_is_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    root = make_tree(tmp_path, "0::/\n", {".": v2(GIB, 2 * GIB)})

    assert cgroups.available_host_bytes(root) == 0


def test_version_1_is_read_with_its_parents_and_their_totals(tmp_path: Path) -> None:
    none = 2**63 - 4096  # what version 1 has for no limit
    folders = {
        "memory": v1(none, 30 * GIB),
        "memory/pod": v1(6 * GIB, 5 * GIB, inactive_file=0, total_inactive_file=3 * GIB),
        "memory/pod/job": v1(none, GIB),
    }
    lines = "11:memory:/pod/job\n5:cpu,cpuacct:/\n1:name=systemd:/\n"
    root = make_tree(tmp_path, lines, folders)

    assert cgroups.available_host_bytes(root) == 4 * GIB
    assert cgroups.memory_limit_bytes(root) == 6 * GIB


@pytest.mark.parametrize("v2_limit", [2 * GIB, 6 * GIB])
def test_both_versions_side_by_side_are_read(tmp_path: Path, v2_limit: int) -> None:
    folders = {
        "memory/a": v1(4 * GIB, GIB),
        "unified/b": v2(v2_limit, GIB),
    }
    root = make_tree(tmp_path, "4:memory:/a\n0::/b\n", folders)

    assert cgroups.available_host_bytes(root) == min(3 * GIB, v2_limit - GIB)


def test_a_container_sees_its_own_cgroup_at_the_top(tmp_path: Path) -> None:
    """Without a cgroup namespace `/proc/self/cgroup` has a path of the host."""
    folders = {"memory": v1(4 * GIB, GIB), "memory/child": v1(3 * GIB, GIB)}
    mounts = {"/sys/fs/cgroup/memory": "/docker/abc"}

    lines = "4:memory:/docker/abc/child\n"
    assert cgroups.available_host_bytes(make_tree(tmp_path / "1", lines, folders, mounts)) == (
        2 * GIB
    )
    lines = "4:memory:/docker/abc\n"
    assert cgroups.available_host_bytes(make_tree(tmp_path / "2", lines, folders, mounts)) == (
        3 * GIB
    )


def test_a_process_outside_of_its_namespace_has_the_limit_at_its_top(tmp_path: Path) -> None:
    root = make_tree(tmp_path, "0::/../../init\n", {".": v2(4 * GIB, GIB)})

    assert cgroups.available_host_bytes(root) == 3 * GIB


@pytest.mark.parametrize(
    ("own", "parent", "cpus"),
    [
        ("max 100000", "max 100000", 16),
        ("400000 100000", "max 100000", 4),
        ("max 100000", "250000 100000", 2),
        ("50000 100000", "max 100000", 1),
        ("9900000 100000", "max 100000", 16),
    ],
)
def test_cpus_are_whole_ones_of_the_least_quota(
    tmp_path: Path, own: str, parent: str, cpus: int
) -> None:
    folders = {"a": {"cpu.max": parent}, "a/b": {"cpu.max": own}}
    root = make_tree(tmp_path, "0::/a/b\n", folders)

    assert cgroups.usable_cpus(root) == cpus


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_cpu_quotas_of_version_1_are_read(tmp_path: Path, folder: str) -> None:
    folders = {
        folder: {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000},
        f"{folder}/a": {"cpu.cfs_quota_us": 300000, "cpu.cfs_period_us": 100000},
        f"{folder}/a/b": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000},
    }
    root = make_tree(tmp_path, "3:cpu,cpuacct:/a/b\n", folders)

    assert cgroups.usable_cpus(root) == 3


def test_affinity_bounds_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    root = make_tree(tmp_path, "0::/\n", {".": {"cpu.max": "400000 100000"}})

    assert cgroups.usable_cpus(root) == 2
