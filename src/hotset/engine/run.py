"""Runs the steps of an engine, one after the other. Imports numpy, no torch."""

import time
from collections.abc import Callable, Iterator

from hotset.clock import REAL_CLOCK, Clock
from hotset.engine.engine import Engine
from hotset.request import RequestOutput


def run_steps(engine: Engine, feed: Callable[[], int | None]) -> Iterator[list[RequestOutput]]:
    """The loop around an engine's steps: yields what each of them put out.

    Args:
        engine: stepped while it has requests, or copies between tiers that run.
        feed: called before each step. Queues what is due, waits where there is nothing to do, and
            returns how many more requests wait for this engine elsewhere; None ends the loop.
    """
    while (num_queued := feed()) is not None:
        has_step = engine.has_work or engine.has_transfers
        yield engine.step(num_queued=num_queued) if has_step else []


def run_to_end(engine: Engine) -> Iterator[RequestOutput]:
    """All outputs of the requests that the engine has, until none is left."""
    for outputs in run_steps(engine, lambda: 0 if engine.has_work else None):
        yield from outputs


def settle(engine: Engine, timeout_s: float, clock: Clock = REAL_CLOCK) -> None:
    """Let what was aborted, and copies between tiers, end for at most `timeout_s` seconds."""
    deadline_s = clock.now() + timeout_s

    def feed() -> int | None:
        if not engine.has_work:
            time.sleep(0.001)
        is_busy = engine.has_work or engine.has_transfers
        return 0 if is_busy and clock.now() < deadline_s else None

    for _ in run_steps(engine, feed):
        pass
