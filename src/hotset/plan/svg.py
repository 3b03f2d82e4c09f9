"""Small charts as inline SVG: stacked bars and lines on logarithmic axes."""

import math
from collections.abc import Iterable, Iterator
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


class _Axes:
    """Two logarithmic axes that hold all points: x in powers of two, y in powers of ten."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        shown = [(x, y) for x, y in points if x > 0 and y > 0]
        self.low_x = min(x for x, _ in shown)
        self.high_x = max(x for x, _ in shown)
        self.low_y = 10 ** math.floor(math.log10(min(y for _, y in shown)))
        self.high_y = 10 ** math.ceil(math.log10(max(y for _, y in shown) * 1.05))
        if self.high_x <= self.low_x:
            self.high_x = 2 * self.low_x

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is in the picture."""
        u = math.log(x / self.low_x) / math.log(self.high_x / self.low_x)
        v = math.log(y / self.low_y) / math.log(self.high_y / self.low_y)
        return LEFT + u * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> Iterator[str]:
        """Lines at each power, with their numbers."""
        tick = self.low_y
        while tick <= self.high_y * 1.001:
            _, y = self.at(self.low_x, tick)
            yield (
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{decimal(tick)}</text>"
            )
            tick *= 10
        tick = 2 ** math.ceil(math.log2(self.low_x) - 1e-9)
        while tick <= self.high_x * 1.001:
            x, _ = self.at(tick, self.low_y)
            yield (
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                f"{short(tick)}</text>"
            )
            tick *= 2

    def line(self, line: Line) -> str:
        """One line, without its points at or below 0."""
        path = " ".join(
            f"{x:.1f},{y:.1f}"
            for x, y in (self.at(*p) for p in line.points if p[0] > 0 and p[1] > 0)
        )
        return f'<polyline class="line {line.style}" points="{path}"/>'

    def mark(self, mark: Mark) -> str:
        """One dot, its label on the side that has room."""
        x, y = self.at(mark.x, mark.y)
        dot = (
            f'<circle class="{mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(mark.title)}</title></circle>"
        )
        if not mark.label:
            return dot
        left = x > WIDTH * 0.7
        return (
            f'{dot}<text class="note" x="{x + (-10 if left else 10):.1f}" y="{y + 21:.1f}" '
            f'text-anchor="{"end" if left else "start"}">{escape(mark.label)}</text>'
        )


def line_chart(
    lines: list[Line], marks: list[Mark], x_name: str, y_name: str, *, label: str
) -> str:
    """Lines and marks over two logarithmic axes, x in powers of two and y of ten."""
    axes = _Axes([p for line in lines for p in line.points] + [(m.x, m.y) for m in marks])
    middle = (HEIGHT - BOTTOM + TOP) / 2
    names = (
        f'<text class="axis" x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x_name)}</text>'
        f'<text class="axis" x="16" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle})">{escape(y_name)}</text>'
    )
    parts = [*axes.grid(), *map(axes.line, lines), *map(axes.mark, marks), names]
    legend = "".join(
        f'<span><i class="{line.style}"></i>{escape(line.name)}</span>' for line in lines
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{"".join(parts)}</svg><p class="legend">{legend}</p>'
    )
