"""Numbers, bars and columns as text. Imports no torch."""

from collections.abc import Sequence


def gib(value: float) -> str:
    """Memory in binary units, as flags take it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:,.{4 if value < 1e4 * size else 9}g} {unit}"
    return f"{value:.0f} B"


def gb(value: float) -> str:
    """Bytes in decimal units, for formulas in which rates are decimal too."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}" if value < 1e15 else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """A duration in the unit that reads best."""
    if value >= 1:
        return f"{value:.3g} s"
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} us"


def rows(cells: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns wide enough for their cells: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append((indent + "  ".join((first, *others))).rstrip())
    return "\n".join(lines)


def bar(share: float, width: int = 24) -> str:
    """A share as a bar of characters."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "#" * filled + "." * (width - filled)
