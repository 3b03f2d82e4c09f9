"""Leaves a store alone that fails, so that nobody waits for it again. Imports no torch."""

import threading

_MOST_FAILURES = 3


class Breaker:
    """Closed while the store works; open after 3 failures in a row: nothing is asked of it then.

    Once open, it closes when the store has answered: one thread looks each 10 seconds, see `Lane`.
    Safe from any thread.

    Attributes:
        is_open: whether the store is to be left alone.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._lock = threading.Lock()
        self._num_failures = 0

    def failed(self, *, at_once: bool = False) -> None:
        """The store failed; `at_once`: in a way that will not pass by itself."""
        with self._lock:
            self._num_failures += 1
            if at_once or self._num_failures >= _MOST_FAILURES:
                self.is_open = True

    def answered(self) -> None:
        """The store did what it was asked to."""
        with self._lock:
            self._num_failures, self.is_open = 0, False
