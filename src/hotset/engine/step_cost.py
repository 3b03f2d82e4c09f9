"""How long a step takes by the tokens of prompts in it, followed while it runs.

Imports no torch.
"""

from collections.abc import Iterable

_SMOOTHING = 0.1  # weight of the newest step
# Steps whose numbers of tokens differ by less than this say little of what a token takes.
_LEAST_SPREAD = 32.0
# A step that takes more than this many times the expected time was held up by something else, such
# as a kernel being compiled; it counts as this many times.
_MOST_SLOWER = 4.0
# Chunks are multiples of this, so that products have few sizes.
_MULTIPLE = 32


class StepCost:
    """A line through recent steps: `base_s`, and `token_s` for each token of a prompt.

    Where steps have all of a size, a line could have any slope: it keeps the one it had.

    Args:
        trials: tokens of prompts and seconds, of steps at the start; two or more sizes.
    """

    def __init__(self, trials: Iterable[tuple[int, float]]) -> None:
        points = list(trials)
        count = len(points)
        self._tokens = sum(x for x, _ in points) / count
        self._seconds = sum(y for _, y in points) / count
        self._square = sum((x - self._tokens) ** 2 for x, _ in points) / count
        product = sum((x - self._tokens) * (y - self._seconds) for x, y in points) / count
        self._product = max(0.0, product)

    @property
    def token_s(self) -> float:
        """Seconds that a token of a prompt adds to a step."""
        slope = max(0.0, self._product / self._square) if self._square else 0.0
        # No more than if the rest of a step took no time.
        return min(slope, self._seconds / self._tokens) if self._tokens else slope

    @property
    def base_s(self) -> float:
        """Seconds of a step without prompts."""
        return max(0.0, self._seconds - self._tokens * self.token_s)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Follow with a step that had `num_tokens` of prompts."""
        slope = self.token_s
        expected = max(self._seconds, self.base_s + num_tokens * slope)
        if expected > 0:
            seconds = min(seconds, _MOST_SLOWER * expected)
        x, y = num_tokens - self._tokens, seconds - self._seconds
        self._tokens += _SMOOTHING * x
        self._seconds += _SMOOTHING * y
        keep = 1.0 - _SMOOTHING
        self._square = keep * (self._square + _SMOOTHING * x * x)
        self._product = keep * (self._product + _SMOOTHING * x * y)
        lack = _LEAST_SPREAD**2 - self._square
        if lack > 0:
            self._square += lack
            self._product += lack * slope

    def most_tokens(self, seconds: float, *, least: int) -> int:
        """Tokens of prompts that take no longer than this: a multiple of 32, and `least` or more.

        They may take as long as the rest of the step in any case, so that prompts get half of the
        time where it is all that slow.
        """
        if self.token_s <= 0.0:
            return 2**31
        most = max(seconds, self.base_s) / self.token_s
        return max(least, int(most) // _MULTIPLE * _MULTIPLE)
