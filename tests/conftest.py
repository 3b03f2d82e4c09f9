"""Fixtures for all tests."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTiers

gc.disable()  # until all test modules are imported

# Without a GPU, kernels run in Triton's interpreter. It is chosen when triton is imported, which
# others do too, so that a test module of kernels may be too late.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees what `hotset probe` measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture
def fake_tiers() -> FakeTiers:
    """Colder tiers whose transfers end when the test says so."""
    return FakeTiers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no GPU."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Compute in one thread: the models are tiny, and the machine may be shared.

    Collections begin here, and leave out what imports have made: see `hotset.garbage`.
    """
    gc.freeze()
    gc.enable()
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Any]]:
    """`engines.make_engine`, closing at the end of the test what it made."""
    import engines

    made: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        made.append(engines.make_engine(*args, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
