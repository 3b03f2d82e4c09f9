"""Threads that do jobs over connections to one store. Imports no torch."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from hotset.memory.remote.breaker import Breaker
from hotset.memory.remote.resp import Connection, StoreError

T = TypeVar("T")

REFRESH_S = 10.0

_LASTING = ("login", "unbounded")  # faults that do not pass by themselves
_log = logging.getLogger(__name__)


class Lane(Generic[T]):
    """Does jobs of one kind, first in, first out; every job ends, whatever the store does.

    A thread has a connection of its own, made as needed. While the breaker is open, jobs end at
    once.

    Args:
        name: of the threads.
        connect: makes a connection.
        run: does a batch of jobs over a connection, and takes those off that ended.
        give_up: ends jobs that were not done, with the kind of fault.
        breaker: of the store.
        faults: counts what went wrong with connections, by kind.
        most: jobs of a batch.
        refresh: called each 10 seconds with a connection, also while the breaker is open.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Connection],
        run: Callable[[Connection, deque[T]], None],
        give_up: Callable[[Iterable[T], str], None],
        *,
        breaker: Breaker,
        faults: Counter[str],
        most: int,
        num_threads: int = 1,
        refresh: Callable[[Connection], None] | None = None,
    ) -> None:
        self._connect, self._run, self._give_up = connect, run, give_up
        self._breaker, self._faults, self._most, self._refresh = breaker, faults, most, refresh
        self._jobs: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=name, daemon=True) for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, job: T) -> None:
        """Add a job."""
        with self._changed:
            is_closed = self._is_closed
            if not is_closed:
                self._jobs.append(job)
                self._changed.notify()
        if is_closed:
            self._give_up([job], "down")

    def close(self, deadline_s: float) -> None:
        """End what is queued, and wait until `deadline_s` for what runs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            left = list(self._jobs)
            self._jobs.clear()
        self._give_up(left, "down")
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _take(self, timeout_s: float | None) -> deque[T] | None:
        """A batch, an empty one if there is none for `timeout_s`; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._is_closed, timeout_s)
            if self._is_closed:
                return None
            return deque(self._jobs.popleft() for _ in range(min(self._most, len(self._jobs))))

    def _work(self) -> None:
        connection, due_s = None, time.monotonic() + REFRESH_S
        while True:
            wait_s = None if self._refresh is None else max(0.0, due_s - time.monotonic())
            jobs = self._take(wait_s)
            if jobs is None:
                break
            is_due = self._refresh is not None and time.monotonic() >= due_s
            if self._breaker.is_open and not is_due:
                self._give_up(jobs, "down")
                continue
            if is_due:
                due_s = time.monotonic() + REFRESH_S
            try:
                if connection is not None and not connection.is_usable:  # idle for too long
                    connection.close()
                    connection = None
                if connection is None:
                    connection = self._connect()
                elif is_due and self._refresh is not None:
                    self._refresh(connection)
                self._run(connection, jobs)
                self._breaker.answered()
            except Exception as error:  # a thread that died would leave its callers waiting
                fault = self._note(error)
                if connection is not None:
                    connection.close()
                    connection = None
                self._give_up(jobs, fault)
        if connection is not None:
            connection.close()

    def _note(self, error: Exception) -> str:
        """Count a fault; returns its kind."""
        fault = error.fault if isinstance(error, StoreError) else "error"
        if fault == "error":
            _log.error("a transfer to a store failed", exc_info=error)
        self._faults[fault] += 1
        self._breaker.failed(at_once=fault in _LASTING)
        return fault
