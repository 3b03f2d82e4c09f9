"""Charts over linear axes, as inline SVG in the style of the planner's pages."""

import math
from dataclasses import dataclass
from html import escape

from hotset.plan import svg
from hotset.plan.svg import WIDTH, Axis, Limit, Line, Mark, decimal

_MOST_POINTS = 400
_MOST_DOTS = 12
_BAR, _GAP = 26, 12


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: its name, its value, and what was predicted for it."""

    name: str
    value: float
    predicted: float | None
    style: str


def ticks(high: float, *, about: int = 5) -> list[float]:
    """Round values from 0 to at least `high`."""
    if high <= 0:
        return [0.0, 1.0]
    rough = high / about
    size: float = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most some hundred points; of each group the highest, so that peaks stay."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [max(group, key=lambda point: point[1]) for group in groups]


def chart(
    lines: list[Line],
    limits: list[Limit],
    x_name: str,
    y_name: str,
    *,
    label: str,
    x_ticks: list[float] | None = None,
) -> str:
    """Lines over time or turns, from 0 on both axes; few points have dots."""
    points = [point for line in lines for point in line.points]
    if not points:
        return '<p class="dim">Nothing was recorded.</p>'
    marks_x = x_ticks or ticks(max(x for x, _ in points), about=8)
    marks_y = ticks(max([y for _, y in points] + [limit.value for limit in limits]))
    high_x = marks_x[-1] if marks_x[-1] > marks_x[0] else marks_x[0] + 1
    dots = [
        Mark(x, y, line.style, f"{line.name}: {decimal(y)}")
        for line in lines
        if len(line.points) <= _MOST_DOTS
        for x, y in line.points
    ]
    return svg.chart(
        [Line(line.name, thin(line.points), line.style) for line in lines],
        Axis(x_name, marks_x, marks_x[0], high_x),
        Axis(y_name, marks_y, 0.0, marks_y[-1]),
        label=label,
        marks=dots,
        limits=limits,
    )


def bar_chart(bars: list[Bar], *, label: str, digits: int) -> str:
    """Horizontal bars with their values; a tick is what was predicted."""
    high = max([bar.value for bar in bars] + [bar.predicted or 0.0 for bar in bars]) or 1.0
    name_width, value_width = 170, 110
    scale = (WIDTH - name_width - value_width) / high
    parts = []
    for i, bar in enumerate(bars):
        y = i * (_BAR + _GAP)
        width = max(1.0, bar.value * scale)
        name = bar.name if len(bar.name) <= 24 else f"...{bar.name[-21:]}"
        parts.append(
            f'<text x="0" y="{y + 18}">{escape(name)}</text>'
            f'<rect class="{bar.style}" x="{name_width}" y="{y}" width="{width:.1f}" '
            f'height="{_BAR}" rx="3"/>'
        )
        end = name_width + width
        if bar.predicted is not None:
            x = name_width + bar.predicted * scale
            if end - 2 < x < end + 80:  # the tick would cross the value
                end = x
            parts.append(
                f'<line class="expected" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 4}" '
                f'y2="{y + _BAR + 4}"><title>predicted: {bar.predicted:,.{digits}f}</title></line>'
            )
        parts.append(
            f'<text class="note" x="{end + 8:.1f}" y="{y + 18}">{bar.value:,.{digits}f}</text>'
        )
    height = len(bars) * (_BAR + _GAP)
    return (
        f'<svg viewBox="0 -6 {WIDTH} {height + 6}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
