"""Charts over linear axes, as inline SVG in the style of the planner's pages."""

import math
from dataclasses import dataclass
from html import escape

from hotset.plan.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, decimal

_MOST_POINTS = 400
_BAR, _GAP = 26, 12


@dataclass(frozen=True, slots=True)
class Limit:
    """A level that is marked across a chart."""

    name: str
    value: float
    style: str = "other"


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
    """Lines over time or turns, from 0 on both axes."""
    points = [point for line in lines for point in line.points]
    if not points:
        return '<p class="dim">Nothing was recorded.</p>'
    marks_x = x_ticks or ticks(max(x for x, _ in points), about=8)
    marks_y = ticks(max([y for _, y in points] + [limit.value for limit in limits]))
    low_x, high_x, high_y = (marks_x[0] if x_ticks else 0.0), marks_x[-1], marks_y[-1]
    high_x = high_x if high_x > low_x else low_x + 1

    def at(x: float, y: float) -> tuple[float, float]:
        u, v = (x - low_x) / (high_x - low_x), y / high_y
        return LEFT + u * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in marks_y:
        _, y = at(low_x, value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{decimal(value)}</text>"
        )
    for value in marks_x:
        x, _ = at(value, 0)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{decimal(value)}</text>"
        )
    for limit in limits:
        _, y = at(low_x, limit.value)
        parts.append(
            f'<line class="limit {limit.style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
            f'y2="{y:.1f}"/><text class="tick" x="{WIDTH - RIGHT - 4}" y="{y - 5:.1f}" '
            f'text-anchor="end">{escape(limit.name)}</text>'
        )
    for line in lines:
        shown = [at(*point) for point in thin(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(shown) <= 12:
            parts += [
                f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in shown
            ]
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(
        f'<text class="axis" x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x_name)}</text>'
        f'<text class="axis" x="16" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle})">{escape(y_name)}</text>'
    )
    legend = "".join(
        f'<span><i class="{line.style}"></i>{escape(line.name)}</span>' for line in lines
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{"".join(parts)}</svg><p class="legend">{legend}</p>'
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
