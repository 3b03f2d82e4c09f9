"""What a result must say about where it was made, and memory of the machine."""

import gc
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hotset
from hotset.cgroups import memory_limit_bytes, usable_cpus

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "transformers", "flashinfer-python", "triton", "numpy")


def describe_machine() -> dict[str, Any]:
    """Versions, commit, hardware and command line: plain data."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gpus.append({"name": facts.name, "memory_bytes": facts.total_memory})
    versions = {"python": platform.python_version(), "hotset": hotset.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "command": " ".join(["hotset", *sys.argv[1:]]),
        "commit": _commit(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cpu_cores": usable_cpus(),
        "cpu_threads": torch.get_num_threads(),
        "host_memory_bytes": memory_limit_bytes(),
        "gpus": gpus,
    }


def _commit() -> str | None:
    """The commit of the checkout this package is in, marked where files were changed."""
    folder = Path(hotset.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (" with changes" if changed else "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def release(device: "torch.device") -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
