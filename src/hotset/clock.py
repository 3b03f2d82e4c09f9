"""What time it is, for what decides by it. Imports no torch."""

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time; a played one passes when it is told to."""

    def now(self) -> float:
        """Seconds since some moment; they never go back."""
        ...


class RealClock:
    """The machine's, which all its processes share."""

    def now(self) -> float:
        """See `Clock`."""
        return time.monotonic()


REAL_CLOCK = RealClock()
