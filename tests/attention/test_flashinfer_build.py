"""A machine that cannot build FlashInfer's kernels is told what it lacks, in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer

from hotset.attention.flashinfer.build import why_not_built

BUILD_OUTPUT = """Ninja build failed. Ninja output:
ninja: Entering directory `/home/user/.cache/flashinfer/0.6.12/90a/cached_ops'
[1/4] nvcc --generate-dependencies-with-compile -o error.o
FAILED: [code=1] batch_prefill.cuda.o
/usr/include/x.h(3): fatal error: cuda_fp8.h: No such file or directory
ninja: build stopped: subcommand failed.
"""


def program(folder: Path, name: str, text: str = "exit 0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with all that a build needs for CUDA 13.0."""
    for name in ("CUDA_PATH", "CXX", "FLASHINFER_NVCC"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    program(folder, "ninja")
    program(folder, "c++")
    program(tmp_path / "cuda" / "bin", "nvcc", "echo 'Cuda compilation tools, release 13.0, V13'")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return folder


def why(error: BaseException | None = None) -> str:
    message = why_not_built(error or RuntimeError("Ninja build failed."), "13.0")
    assert "\n" not in message
    return message


def test_without_ninja(machine: Path) -> None:
    (machine / "ninja").unlink()
    assert "ninja is not on the PATH; pip install ninja" in why(FileNotFoundError("ninja"))


def test_without_nvcc(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert "no /nonexistent/bin/nvcc; install the toolkit of CUDA 13.0" in why()


def test_with_an_nvcc_of_another_cuda(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME")
    program(machine, "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.99'")
    assert "is of CUDA 12.4 but PyTorch of 13.0" in why()


def test_with_an_nvcc_that_does_not_run(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_NVCC", str(program(machine, "nvcc", "exit 1")))
    assert "does not run" in why()


def test_without_a_compiler(machine: Path) -> None:
    (machine / "c++").unlink()
    assert "no C++ compiler c++; install g++" in why()


def test_with_all_of_them_the_first_error_of_the_build_is_told(machine: Path) -> None:
    message = why(RuntimeError(BUILD_OUTPUT))
    assert message.startswith("/usr/include/x.h(3): fatal error: cuda_fp8.h: No such file")
    assert "flashinfer and start again" in message
    assert why(RuntimeError()).startswith("RuntimeError; ")


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_the_program_ends_with_that_line(eager: bool, tmp_path: Path) -> None:
    """Eager too: attention is FlashInfer's there as well."""
    folder = tmp_path / "model"
    make_model("llama", vocab_size=512, head_dim=64).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    run = subprocess.run(
        [
            *(sys.executable, "-c", "from hotset.cli import main; main()", "generate"),
            *("Hello", "--raw", "--model", str(folder), "--hot-gib", "0.1", "--device", "cuda"),
            *(["--eager"] if eager else []),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_HOME": "/nonexistent",
            "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    [line] = [line for line in run.stderr.splitlines() if "FlashInfer" in line]
    assert "no /nonexistent/bin/nvcc" in line or "ninja is not on the PATH" in line
