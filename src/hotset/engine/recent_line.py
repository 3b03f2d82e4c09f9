"""A line through points that come one after the other. Imports no torch."""

from collections.abc import Iterable

# A point that is above the line by more than this many times was held up by something else, such
# as a kernel being compiled; it counts as this many times.
_MOST_ABOVE = 4.0


class RecentLine:
    """A line through recent points: `base` at 0, and `slope`, neither below 0.

    Where points have all the same x, a line could have any slope: it keeps the one it had.

    Args:
        points: x and y of the first ones; with one or none the slope is 0.
        smoothing: weight of the newest point.
        least_spread: points whose x differ by less than this say little of the slope.
    """

    def __init__(
        self, points: Iterable[tuple[float, float]], *, smoothing: float, least_spread: float
    ) -> None:
        self._smoothing, self._least_square = smoothing, least_spread**2
        self._x = self._y = self._square = self._product = 0.0
        given = list(points)
        self._has_points = bool(given)
        if given:
            count = len(given)
            self._x = sum(x for x, _ in given) / count
            self._y = sum(y for _, y in given) / count
            self._square = sum((x - self._x) ** 2 for x, _ in given) / count
            product = sum((x - self._x) * (y - self._y) for x, y in given) / count
            self._product = max(0.0, product)

    @property
    def slope(self) -> float:
        """What y grows by with each x."""
        slope = max(0.0, self._product / self._square) if self._square else 0.0
        # No more than with a base of 0.
        return min(slope, self._y / self._x) if self._x else slope

    @property
    def base(self) -> float:
        """Where x is 0; 0 before the first point."""
        return max(0.0, self._y - self._x * self.slope)

    def observe(self, x: float, y: float) -> None:
        """Follow with a point."""
        if not self._has_points:
            self._x, self._y, self._has_points = x, y, True
            return
        slope = self.slope
        expected = max(self._y, self.base + x * slope)
        if expected > 0:
            y = min(y, _MOST_ABOVE * expected)
        x, y = x - self._x, y - self._y
        self._x += self._smoothing * x
        self._y += self._smoothing * y
        keep = 1.0 - self._smoothing
        self._square = keep * (self._square + self._smoothing * x * x)
        self._product = keep * (self._product + self._smoothing * x * y)
        lack = self._least_square - self._square
        if lack > 0:
            self._square += lack
            self._product += lack * slope
