"""A pair of ranks, started once for a module and ended with it: others run in this process too."""

import contextlib
from collections.abc import Callable, Iterator

import engines
import pytest
import rank_engines

from hotset.engine.engine import Engine
from hotset.layout import Layout
from hotset.metrics import Metrics
from hotset.parallel import group
from hotset.ranks.driver import Ranks

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def layout() -> Layout:
    """Of the pair; a module may have another."""
    return Layout(tp=2)


@pytest.fixture(scope="module")
def pair(layout: Layout) -> Iterator[Ranks]:
    """Two ranks on the CPU; this process is one of them."""
    ranks = Ranks(layout, "cpu", step_timeout_s=60.0)
    yield ranks
    ranks.close()


@pytest.fixture
def run_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[int]], Metrics]]:
    """Runs prompts on an engine of one rank in this process, as if it had joined no group.

    Gives their answers, and the engine's counters.
    """

    def run(
        *args: object, params: dict[str, object] | None = None, **options: object
    ) -> tuple[list[list[int]], Metrics]:
        with monkeypatch.context() as patch:
            patch.setattr(group, "_current", group._ONE)
            with contextlib.closing(engines.make_engine(*args, **options)) as engine:
                answers = engines.run(engine, engines.make_prompts(), **params or {})
        return answers, engine.metrics

    return run


@pytest.fixture
def make_ranked(pair: Ranks) -> Iterator[MakeEngine]:
    """`rank_engines.make_ranked_engine`, closing at the end of the test what it made."""
    made: list[Engine] = []

    def make(*args: object, **options: object) -> Engine:
        made.append(rank_engines.make_ranked_engine(pair, *args, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
