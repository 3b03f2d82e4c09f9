"""Small charts as inline SVG: stacked bars and lines on logarithmic axes."""

import math
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


def line_chart(
    lines: list[Line], marks: list[Mark], x_name: str, y_name: str, *, label: str
) -> str:
    """Lines and marks over two logarithmic axes, x in powers of two and y of ten."""
    points = [p for line in lines for p in line.points] + [(m.x, m.y) for m in marks]
    points = [(x, y) for x, y in points if x > 0 and y > 0]
    low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
    low_y = 10 ** math.floor(math.log10(min(p[1] for p in points)))
    high_y = 10 ** math.ceil(math.log10(max(p[1] for p in points) * 1.05))
    if high_x <= low_x:
        high_x = 2 * low_x

    def at(x: float, y: float) -> tuple[float, float]:
        u = math.log(x / low_x) / math.log(high_x / low_x)
        v = math.log(y / low_y) / math.log(high_y / low_y)
        return LEFT + u * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM)

    parts = []
    tick = low_y
    while tick <= high_y * 1.001:
        _, y = at(low_x, tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{decimal(tick)}</text>"
        )
        tick *= 10
    tick = 2 ** math.ceil(math.log2(low_x) - 1e-9)
    while tick <= high_x * 1.001:
        x, _ = at(tick, low_y)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{short(tick)}</text>"
        )
        tick *= 2
    for line in lines:
        path = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in line.points if p[0] > 0 and p[1] > 0)
        )
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
    for mark in marks:
        x, y = at(mark.x, mark.y)
        parts.append(
            f'<circle class="{mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(mark.title)}</title></circle>"
        )
        if mark.label:
            left = x > WIDTH * 0.7
            parts.append(
                f'<text class="note" x="{x + (-10 if left else 10):.1f}" y="{y + 21:.1f}" '
                f'text-anchor="{"end" if left else "start"}">{escape(mark.label)}</text>'
            )
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
