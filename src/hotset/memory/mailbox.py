"""How threads tell another one what they did. Imports no torch."""

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """What ended, on its way from the workers to the thread that polls."""

    def __init__(self) -> None:
        self._ended: deque[T] = deque()
        self._filled = threading.Condition()

    def put(self, one: T) -> None:
        """Hand in what has ended."""
        with self._filled:
            self._ended.append(one)
            self._filled.notify_all()

    def take(self) -> list[T]:
        """All that ended since the last call, in the order they ended."""
        with self._filled:
            ended = list(self._ended)
            self._ended.clear()
        return ended

    def wait(self, timeout_s: float) -> None:
        """Block until there is something to take, or for `timeout_s`."""
        with self._filled:
            self._filled.wait_for(lambda: bool(self._ended), timeout_s)
