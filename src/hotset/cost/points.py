"""Times between those that were measured.

Imports no torch.
"""

import itertools
from collections.abc import Sequence

Point = tuple[int, float]  # a size, such as bytes or rows, and seconds


def seconds_at(points: Sequence[Point], size: float) -> float:
    """Time of `size` on the lines between measured points, and at least the first one's.

    Args:
        points: by size, ascending. One alone is taken for a rate.
        size: beyond the last point it lies on the last line.
    """
    first, first_s = points[0]
    if size <= first or len(points) == 1:
        return first_s * max(1.0, size / first)
    for (low, low_s), (high, high_s) in itertools.pairwise(points):
        if size <= high or (high, high_s) == points[-1]:
            return low_s + (high_s - low_s) * (size - low) / (high - low)
    raise AssertionError("points do not ascend")
