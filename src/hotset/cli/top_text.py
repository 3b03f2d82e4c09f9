"""Sizes and times in few characters."""


def short_bytes(count: float) -> str:
    """With one decimal and a unit: `1.5 GB`."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def short_seconds(value: float | None) -> str:
    """In ms below a second: `12.5 ms`; a dash where there is no value."""
    if value is None:
        return "-"
    return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
