"""What OpenMP, oneDNN and torch are told, and that they heed it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from hotset import cpu_libraries
from hotset.engine.engine import Engine
from hotset.errors import ConfigError
from hotset.options import Options

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_GROWTH = """
import psutil, torch
from hotset.cpu_libraries import bound_kernels
bound_kernels()
from hotset.linear.packed import PackedLinear
torch.set_num_threads(1)
linears = [PackedLinear(torch.nn.Linear(64, n).requires_grad_(False)) for n in (64, 96, 128, 160)]
for rows in range(1, 181):
    for linear in linears:
        linear(torch.zeros(rows, 64))
    if rows == 50:
        before = psutil.Process().memory_info().rss
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


@pytest.fixture
def threads() -> Iterator[int]:
    """torch's number, as it was, at the end."""
    number = torch.get_num_threads()
    yield number
    torch.set_num_threads(number)


def run_python(code: str, **variables: str) -> tuple[str, str]:
    """What `code` prints and says, in a process without our variables but for `variables`."""
    ours = {*KERNELS, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    environment = {k: v for k, v in os.environ.items() if k not in ours} | variables
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is without oneDNN")
def test_memory_does_not_grow_with_each_number_of_rows() -> None:
    grown_mib = float(run_python(_GROWTH)[0])
    assert grown_mib < 60  # measured: 12; and 267 with the numbers that the libraries have

    grown_mib = float(run_python(_GROWTH, **dict.fromkeys(KERNELS, "1024"))[0])
    assert grown_mib > 120  # so that this test sees what it is about


def test_an_engine_bounds_what_is_kept(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KERNELS[0], raising=False)
    monkeypatch.setenv(KERNELS[1], "7")
    make_engine()
    assert int(os.environ[KERNELS[0]]) < 1024
    assert os.environ[KERNELS[1]] == "7"  # the user's


@pytest.mark.skipif(sys.platform != "linux", reason="reads what GNU's OpenMP says")
def test_importing_llm_lets_threads_wait_without_spinning() -> None:
    shown = run_python("from hotset import LLM\nimport torch", OMP_DISPLAY_ENV="true")[1]
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown


def test_the_command_line_sets_waiting_before_torch_is_loaded() -> None:
    code = """
import os, sys
from hotset.cli import main
sys.argv = ["hotset", "--version"]
try:
    main()
finally:
    assert "torch" not in sys.modules
    print(os.environ["OMP_WAIT_POLICY"])
"""
    assert run_python(code)[0].endswith("PASSIVE\n")
    assert run_python(code, OMP_WAIT_POLICY="ACTIVE")[0].endswith("ACTIVE\n")


def test_threads_are_no_more_than_the_cpus(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_libraries, "usable_cpus", lambda: 3)
    torch.set_num_threads(8)
    assert cpu_libraries.set_threads(None) == torch.get_num_threads() == 3
    assert cpu_libraries.set_threads(2) == torch.get_num_threads() == 2
    assert cpu_libraries.set_threads(None) == 2
    with pytest.raises(ConfigError, match="threads is 4, but this process can keep 3 CPUs busy"):
        cpu_libraries.set_threads(4)
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigError, match="threads is 0; expected 1 or more"):
        Options.of(threads=0)


def test_an_engine_computes_in_the_threads_it_was_given(
    threads: int, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_libraries, "usable_cpus", lambda: 2)
    assert "threads that compute: 2" in make_engine(threads=2).report
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigError, match="expected 1 to 2, or leave it out"):
        make_engine(threads=3)
