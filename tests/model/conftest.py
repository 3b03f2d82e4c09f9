"""Engines over tiny models, closed when the test ends."""

from collections.abc import Callable, Iterator
from typing import Any

import engines
import pytest

from hotset.engine.engine import Engine

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
