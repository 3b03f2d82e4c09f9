"""Hot requests with all going wrong that can: a few here, hundreds in `benchmarks/hot_soak.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sparse_soak import soak

from hotset.engine.engine import Engine


@pytest.mark.parametrize("seed", [4, 14])
def test_a_soak_with_aborts_forks_faults_and_little_host_memory_ends_with_all_back(
    seed: int, make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    events = soak(make_engine, seed, 28, tmp_path)
    assert events["turned_hot"] and events["preempted"] and events["aborted"] and events["forked"]
