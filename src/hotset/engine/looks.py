"""Snapshots of an engine that were asked for and have not come. Imports no torch."""

import itertools
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from hotset.engine.messages import EngineHost
from hotset.engine.status import EngineStatus
from hotset.errors import EngineError


class Looks:
    """Keeps a future for each look at one engine. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, Future[EngineStatus]] = {}  # guarded by _lock
        self._ids = itertools.count()

    def ask(self, host: EngineHost) -> "Future[EngineStatus]":
        """Ask for a snapshot, which a coming report brings."""
        future: Future[EngineStatus] = Future()
        look_id = next(self._ids)
        with self._lock:
            self._open[look_id] = future
        host.look(look_id)
        return future

    def answer(self, looks: Iterable[tuple[int, EngineStatus | str]]) -> None:
        """Take the snapshots of a report, or why there is none."""
        for look_id, seen in looks:
            with self._lock:
                future = self._open.pop(look_id, None)
            if future is not None and future.set_running_or_notify_cancel():
                if isinstance(seen, str):
                    future.set_exception(EngineError(seen))
                else:
                    future.set_result(seen)

    def fail(self, error: str) -> None:
        """No more snapshots come."""
        with self._lock:
            futures, self._open = list(self._open.values()), {}
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError(error))
