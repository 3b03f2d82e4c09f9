"""Engines over tiny models, closed when the test ends."""

from collections.abc import Callable, Iterator
from typing import Any

import engines
import pytest
import torch

from hotset.engine.engine import Engine

torch.set_num_threads(1)  # the models are tiny, and the machine may be shared

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """`engines.make_engine`, closing at the end of the test what it made."""
    made: list[Engine] = []

    def make(*args: Any, **options: Any) -> Engine:
        made.append(engines.make_engine(*args, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
