"""What the parts of a step take on the device, by events around the calls that launch them."""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


class Parts:
    """Device seconds of watched calls, by name.

    A part that the host launches late has the wait in it: the parts of a step are those of the
    device alone only where the device is behind the host.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Have each call of `owner.attribute` counted as `name` from now on."""
        setattr(owner, attribute, self.watched(getattr(owner, attribute), name))

    def watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`call`, counted as `name`."""

        def run(*arguments: Any, **options: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            found = call(*arguments, **options)
            end.record()
            self._calls.append((name, start, end))
            return found

        return run

    def take(self, num_steps: int = 1) -> dict[str, float]:
        """Seconds of each name per step, of all calls since the last time."""
        torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self._calls:
            seconds[name] += start.elapsed_time(end) / 1e3 / num_steps
        self._calls.clear()
        return dict(seconds)


def device_s(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds on the device of each of `repeats` calls, one after another, after one more."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [one.elapsed_time(other) / 1e3 for one, other in pairwise(events)]
