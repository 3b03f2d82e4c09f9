"""Why FlashInfer cannot be imported or its kernels be built on this machine, in one line.

FlashInfer compiles its kernels on first use, with `ninja`, the `nvcc` of a CUDA toolkit and a C++
compiler, and keeps the result in `~/.cache/flashinfer`. Its errors name none of these well.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hotset.errors import ModelError

_TOOLKIT = Path("/usr/local/cuda")
_NVCC_TIMEOUT_S = 20
_ERROR_LINE = re.compile(r"\b(fatal error|error|Error|cannot find|No space left)\b")


@contextmanager
def importing() -> Iterator[None]:
    """Within it FlashInfer, and kernels that need Triton, are imported.

    Raises:
        ModelError: one of them is not installed, or does not load.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"attention on an NVIDIA GPU needs flashinfer-python and triton ({error}); "
            "pip install 'hotset[cuda]'"
        ) from error


@contextmanager
def building() -> Iterator[None]:
    """Within it FlashInfer's kernels run for the first time, which builds them.

    Raises:
        ModelError: they cannot be built, and why. Errors of memory pass.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler that is not there makes of it
        reason = why_not_built(error, torch.version.cuda)
        raise ModelError(
            f"FlashInfer cannot build its attention kernels, which eager steps need too: {reason}"
        ) from error


def why_not_built(error: BaseException, torch_cuda: str | None) -> str:
    """One line: what was missing, and what to do.

    Args:
        error: what FlashInfer raised.
        torch_cuda: the CUDA version of PyTorch, as `torch.version.cuda`.
    """
    wanted = f"CUDA {torch_cuda}" if torch_cuda else "CUDA"
    if shutil.which("ninja") is None:
        return "ninja is not on the PATH; pip install ninja"
    nvcc = _nvcc()
    if not nvcc.is_file():
        return (
            f"there is no {nvcc}; install the toolkit of {wanted}, which PyTorch was built with, "
            "or set CUDA_HOME to where it is"
        )
    version = _version_of(nvcc)
    if version is None:
        return f"{nvcc} does not run; install the toolkit of {wanted} again, or set CUDA_HOME"
    if torch_cuda is not None and version.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"{nvcc} is of CUDA {version} but PyTorch of {torch_cuda}; install the toolkit of "
            f"{wanted}, or set CUDA_HOME to where it is"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}; install g++, or set CXX"
    return (
        f"{_telling_line(str(error)) or type(error).__name__}; if a build was broken off, "
        f"remove {_cache()} and start again"
    )


def _nvcc() -> Path:
    """The compiler that FlashInfer calls, whether it exists or not."""
    if chosen := os.environ.get("FLASHINFER_NVCC"):
        return Path(chosen)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None and (found := shutil.which("nvcc")):
        return Path(found)
    return Path(home or _TOOLKIT) / "bin" / "nvcc"


def _version_of(nvcc: Path) -> str | None:
    try:
        run = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=_NVCC_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"release (\d+\.\d+)", run.stdout)
    return match[1] if match and run.returncode == 0 else None


def _telling_line(text: str) -> str:
    """The first line of a build's output that names an error, else its last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # The first line only says that the build failed.
    told = [line for line in lines[1:] if _ERROR_LINE.search(line) and not line.startswith("[")]
    return (told or lines[-1:] or [""])[0][:300]


def _cache() -> Path:
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE")
    return (Path(base) if base else Path.home()) / ".cache" / "flashinfer"
