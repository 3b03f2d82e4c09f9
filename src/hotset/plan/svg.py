"""Small charts as inline SVG: stacked bars, and lines over two axes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 340
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 18, 46


@dataclass(frozen=True)
class Segment:
    """A part of a bar: what it is, how much, and the class that colours it."""

    label: str
    value: float
    style: str


def stacked_bar(name: str, size: str, segments: list[Segment], total: float) -> str:
    """One bar of `total`, its segments from left to right, each with a tooltip."""
    x, parts = 0.0, []
    for segment in segments:
        width = WIDTH * max(0.0, segment.value) / total
        title = f"<title>{escape(segment.label)}</title>"
        parts.append(
            f'<rect class="{segment.style}" x="{x:.1f}" y="0" width="{width:.1f}" height="44">'
            f"{title}</rect>"
        )
        short = segment.label.split(":")[0]
        if width > 7.2 * len(short) + 12:
            parts.append(f'<text class="in" x="{x + 7:.1f}" y="27">{escape(short)}</text>')
        x += width
    return (
        f'<p class="bar-name"><b>{escape(name)}</b> {escape(size)}</p>'
        f'<svg viewBox="0 0 {WIDTH} 44" role="img" aria-label="{escape(name)}">'
        f'<rect class="rest" x="0" y="0" width="{WIDTH}" height="44"/>{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class Line:
    """A line: its name, its points, and the class that colours it."""

    name: str
    points: list[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class Mark:
    """A dot on the chart, with a tooltip and, if not empty, a label beside it."""

    x: float
    y: float
    style: str
    title: str
    label: str = ""


@dataclass(frozen=True)
class Limit:
    """A level that is marked across a chart."""

    name: str
    value: float
    style: str = "other"


def short(value: float) -> str:
    """A number for an axis: 4096 is 4k, as tokens and users are counted."""
    for unit, size in (("G", 2**30), ("M", 2**20), ("k", 2**10)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def decimal(value: float) -> str:
    """A number for an axis in thousands."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Axis:
    """One axis, from its first tick to its last or as `low` and `high` say.

    Attributes:
        show: makes the text at a tick.
    """

    name: str
    ticks: Sequence[float]
    low: float
    high: float
    show: Callable[[float], str] = decimal
    is_logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far along the axis a value is, 0 to 1."""
        if self.is_logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def has(self, value: float) -> bool:
        """Whether a value has a place on an axis of its kind."""
        return value > 0 or not self.is_logarithmic


def powers(
    name: str, values: Iterable[float], base: int, show: Callable[[float], str], *, is_round: bool
) -> Axis:
    """A logarithmic axis with a tick at each power; `is_round` lets it begin and end with one."""
    shown = [value for value in values if value > 0]
    log = {2: math.log2, 10: math.log10}[base]  # exact at powers
    low, high = min(shown), max(shown)
    first = math.ceil(log(low) - 1e-9)
    if is_round:
        first = math.floor(log(low))
        low, high = float(base) ** first, float(base) ** math.ceil(log(high * 1.05))
    if high <= low:
        high = base * low
    ticks = []
    while float(base) ** first <= high * 1.001:
        ticks.append(float(base) ** first)
        first += 1
    return Axis(name, ticks, low, high, show, is_logarithmic=True)


def chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    label: str,
    marks: Sequence[Mark] = (),
    limits: Sequence[Limit] = (),
) -> str:
    """Lines, dots and levels over two axes, with a legend of the lines."""

    def at(point_x: float, point_y: float) -> tuple[float, float]:
        return (
            LEFT + x.share(point_x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y.share(point_y) * (HEIGHT - TOP - BOTTOM),
        )

    def path(line: Line) -> str:
        points = [at(*point) for point in line.points if x.has(point[0]) and y.has(point[1])]
        shown = " ".join(f"{u:.1f},{v:.1f}" for u, v in points)
        return f'<polyline class="line {line.style}" points="{shown}"/>'

    parts = [
        *_grid(x, y, at),
        *(_level(limit, at(x.low, limit.value)[1]) for limit in limits),
        *map(path, lines),
        *(_dot(mark, *at(mark.x, mark.y)) for mark in marks),
    ]
    legend = "".join(
        f'<span><i class="{line.style}"></i>{escape(line.name)}</span>' for line in lines
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{"".join(parts)}</svg><p class="legend">{legend}</p>'
    )


def _grid(x: Axis, y: Axis, at: Callable[[float, float], tuple[float, float]]) -> Iterator[str]:
    """A line and a number at each tick, and the names of the axes."""
    for tick in y.ticks:
        _, v = at(x.low, tick)
        yield (
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{v + 4:.1f}" text-anchor="end">'
            f"{y.show(tick)}</text>"
        )
    for tick in x.ticks:
        u, _ = at(tick, y.low)
        yield (
            f'<line class="grid" x1="{u:.1f}" x2="{u:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{u:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{x.show(tick)}</text>"
        )
    middle = (HEIGHT - BOTTOM + TOP) / 2
    yield (
        f'<text class="axis" x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x.name)}</text>'
        f'<text class="axis" x="16" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle})">{escape(y.name)}</text>'
    )


def _level(limit: Limit, v: float) -> str:
    return (
        f'<line class="limit {limit.style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" '
        f'y2="{v:.1f}"/><text class="tick" x="{WIDTH - RIGHT - 4}" y="{v - 5:.1f}" '
        f'text-anchor="end">{escape(limit.name)}</text>'
    )


def _dot(mark: Mark, u: float, v: float) -> str:
    """One dot, its label on the side that has room."""
    dot = (
        f'<circle class="{mark.style}" cx="{u:.1f}" cy="{v:.1f}" r="5">'
        f"<title>{escape(mark.title)}</title></circle>"
    )
    if not mark.label:
        return dot
    left = u > WIDTH * 0.7
    return (
        f'{dot}<text class="note" x="{u + (-10 if left else 10):.1f}" y="{v + 21:.1f}" '
        f'text-anchor="{"end" if left else "start"}">{escape(mark.label)}</text>'
    )


def line_chart(
    lines: list[Line], marks: list[Mark], x_name: str, y_name: str, *, label: str
) -> str:
    """Lines and marks over two logarithmic axes, x in powers of two and y of ten."""
    points = [p for line in lines for p in line.points] + [(m.x, m.y) for m in marks]
    shown = [(x, y) for x, y in points if x > 0 and y > 0]
    x_axis = powers(x_name, [x for x, _ in shown], 2, short, is_round=False)
    y_axis = powers(y_name, [y for _, y in shown], 10, decimal, is_round=True)
    return chart(lines, x_axis, y_axis, label=label, marks=marks)
