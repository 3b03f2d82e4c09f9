"""The picture that `hotset top` draws of a server's status."""

from collections import Counter
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hotset.cli.top_fleet import fleet_lines, fleet_panel
from hotset.cli.top_text import short_bytes, short_seconds

Json = dict[str, Any]

_BLOCK = "■"
_SPARKS = " ▁▂▃▄▅▆▇█"
_FREE = "grey30"
_HELD, _SHARED, _KEPT, _UP, _DOWN = "dark_orange3", "gold1", "tan", "green3", "medium_purple1"
_WARM, _COLD, _WAIT = "orange1", "dodger_blue1", "grey62"
_COLORS = {
    "device": {"f": _FREE, "c": _KEPT, "h": _HELD, "s": _SHARED, "a": _UP, "d": _DOWN},
    "host": {"f": _FREE, "c": _WARM, "h": _DOWN, "a": _UP},
    "disk": {"f": _FREE, "c": _COLD},
}
_TIERS = {
    "device": "hot: device",
    "host": "warm: host memory",
    "disk": "cold: disk",
    "remote": "shared store",
}
_USERS = {
    "m": (_HELD, "moving"),
    "h": (_WARM, "hot"),
    "a": (_UP, "fetching"),
    "p": (_COLD, "parked"),
    "w": (_WAIT, "waiting"),
}
_LEGEND = [
    (_HELD, "one user's"),
    (_SHARED, "shared"),
    (_KEPT, "kept"),
    (_WARM, "in host memory"),
    (_COLD, "on disk"),
    (_UP, "arriving"),
    (_DOWN, "being copied"),
    (_FREE, "free"),
]
_LEAST_WIDTH = 60
_RANK_LINES = 3  # of their panel, beside one per rank


def view(status: Json, width: int, height: int | None = None) -> RenderableType:
    """Everything, for a terminal of `width` columns and, if it matters, `height` rows."""
    width = max(_LEAST_WIDTH, width)
    left = width * 3 // 5
    # What is left of the height beside the other panels goes to the maps, line by line.
    tiers, fleet = status["engine"]["tiers"], status["fleet"]
    parts: list[RenderableType] = [_head(status, width)]
    if fleet is not None:
        parts.append(fleet_panel(fleet, width))
        height = height and height - fleet_lines(fleet)
    if len(ranks := status["engine"]["ranks"]) > 1:
        parts.append(_ranks(ranks))
        height = height and height - len(ranks) - _RANK_LINES
    map_lines = 6
    if height is not None and tiers:
        map_lines = max(1, (height - 12 - 2 * len(tiers)) // len(tiers))
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=left)
    grid.add_column()
    grid.add_row(
        _memory(tiers, left - 4, map_lines),
        Group(_users(status, width - left - 6), _latency(status), _flows(status)),
    )
    return Group(*parts, grid)


def failed(message: str) -> RenderableType:
    """What to show while there is no status."""
    return Panel(Text(message, style="red"), title="hotset", border_style="red")


def _head(status: Json, width: int) -> RenderableType:
    rate = status["rates"]["output_tokens_per_s"]
    text = Text.assemble(
        ("hotset ", "bold"),
        (f"{status['model']}  ", "dim"),
        (f"up {_span(status['uptime_s'])}  ", "dim"),
        (f"{rate:,.0f}", "bold dark_orange3"),
        (" tokens/s  ", "dim"),
        (_sparks(status["history"]["output_tokens_per_s"], max(0, width - 70)), _HELD),
    )
    text.no_wrap = True
    return text


def _memory(tiers: list[Json], width: int, most_lines: int) -> RenderableType:
    parts: list[RenderableType] = []
    for tier in tiers:
        used, capacity, size = tier["used"], tier["capacity"], tier["block_bytes"]
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column()
        head.add_column(justify="right")
        head.add_row(
            Text(_TIERS.get(str(tier["name"]), str(tier["name"])), style="bold"),
            Text(
                f"{used:,} of {capacity:,} blocks, {short_bytes(used * size)} of "
                f"{short_bytes(capacity * size)}",
                style="dim",
            ),
        )
        colors = _COLORS.get(tier["name"], _COLORS["disk"])
        parts += [head, _cells(tier["cells"], colors, width, most_lines)]
    legend = Text(no_wrap=False)
    for color, text in _LEGEND:
        legend.append(_BLOCK, style=color).append(f" {text}  ", style="dim")
    return Panel(Group(*parts, legend), title="memory", title_align="left")


def _cells(states: str, colors: dict[str, str], width: int, most_lines: int) -> Text:
    """The states in order; where there is no room for all, each cell stands for several."""
    each = -(-len(states) // (width * most_lines)) if states else 1
    text = Text()
    for start in range(0, len(states), each):
        state = Counter(states[start : start + each]).most_common(1)[0][0]
        text.append(_BLOCK, style=colors.get(state, "red"))
        if (start // each + 1) % width == 0:
            text.append("\n")
    return text


def _ranks(ranks: list[Json]) -> RenderableType:
    """What each rank has of the memory, and its link."""
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
    table.add_column("rank")
    for name in ("device", "device memory", "host memory", "disk at most", "link"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, one in enumerate(ranks):
        rate = one["link_bytes_per_s"]
        table.add_row(
            str(number),
            f"{one['device']} on {one['host']}",
            f"{short_bytes(one['used_bytes'])} of {short_bytes(one['total_bytes'])}",
            short_bytes(one["host_bytes"]),
            short_bytes(one["disk_bytes"]),
            f"{short_bytes(rate)}/s" if rate else "-",
        )
    return Panel(table, title="ranks", title_align="left")


def _users(status: Json, width: int) -> RenderableType:
    engine = status["engine"]
    counts = [engine[f"num_{name}"] for _, name in _USERS.values()]
    line = Text().append(f"{sum(counts):,}", style="bold")
    for (color, name), count in zip(_USERS.values(), counts, strict=True):
        line.append(f" {_BLOCK}", style=color).append(f"{count:,} {name}", style="dim")
    cells = _cells(engine["users"], {k: color for k, (color, _) in _USERS.items()}, width, 4)
    return Panel(Group(line, cells), title="users", title_align="left")


def _latency(status: Json) -> RenderableType:
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for label, key in (
        ("TTFT", "ttft"),
        ("ITL", "itl"),
        ("queue", "queue"),
        ("request", "e2e"),
    ):
        values = status["latency_s"][key]
        table.add_row(label, *(short_seconds(values[name]) for name in ("p50", "p90", "p99")))
    return Panel(table, title="latency", title_align="left")


def _flows(status: Json) -> RenderableType:
    totals, limits = status["totals"], status["engine"]["link_bytes_per_s"]
    table = Table.grid(expand=True)
    table.add_column()
    table.add_column(justify="right", style="dim")
    slowest_first = [tier["name"] for tier in status["engine"]["tiers"]][::-1]
    for way, rate in sorted(status["rates"]["moved_bytes_per_s"].items()):
        slow = next((name for name in slowest_first if name in way), "")
        limit = f" of {short_bytes(limits[slow])}/s" if slow in limits else ""
        table.add_row(way.replace(">", " → "), f"{short_bytes(rate)}/s{limit}")
    table.add_row("fetched / recomputed", f"{totals['fetched_tokens']:,} / "
        f"{totals['recompute_chosen_tokens'] + totals['recomputed_tokens']:,} tokens")  # fmt: skip
    found, resumed = (sum(totals[name].values()) for name in ("cached_tokens", "resumed_tokens"))
    table.add_row("prefix hits", f"{found:,} of {totals['prompt_tokens']:,}")
    table.add_row("forked", f"{totals['forked_tokens']:,} tokens")
    table.add_row("resumed", f"{resumed:,} tokens")
    moved = totals["moved_bytes"]
    if written := moved.get("host>remote", 0):
        unread = max(0, written - totals["tier_bytes"].get("remote first_read", 0))
        read = moved.get("remote>host", 0)
        table.add_row("shared store: written, read", f"{short_bytes(written)}, {short_bytes(read)}")
        table.add_row("written and not read yet", f"{short_bytes(unread)}, {unread / written:.0%}")
    if status["engine"]["states"] is not None:
        hits = ", ".join(f"{count:,} {tier}" for tier, count in totals["state_hits"].items())
        table.add_row("states found", hits or "0")
        table.add_row("KV without state", f"{totals['stateless_tokens']:,} tokens")
    table.add_row("parked to make room", f"{totals['preemptions']:,} times")
    if needed := totals["hot_hits"] + totals["hot_misses"]:
        share = totals["hot_hits"] / needed
        table.add_row("selected tokens in slots", f"{share:.1%} of {needed:,}")
    if guessed := totals["hot_guessed"]:
        right = totals["hot_guessed_right"] / guessed
        table.add_row("tokens that came ahead: right", f"{right:.1%} of {guessed:,}")
    experts = totals["experts"]
    if needed := experts["hits"] + experts["misses"]:
        table.add_row("experts found in slots", f"{experts['hits'] / needed:.1%} of {needed:,}")
    if experts["predicted"]:
        right = experts["predicted_right"] / experts["predicted"]
        table.add_row("experts guessed right", f"{right:.1%} of {experts['predicted']:,}")
    faults = ", ".join(f"{kind} {count:,}" for kind, count in totals["faults"].items())
    table.add_row("faults", Text(faults or "none", style="red" if faults else "dim"))
    return Panel(Columns([table], expand=True), title="links and choices", title_align="left")


def _sparks(values: list[float], width: int) -> str:
    values = values[-width:] if width else []
    top = max(values, default=0) or 1
    return "".join(_SPARKS[round(value / top * (len(_SPARKS) - 1))] for value in values)


def _span(seconds: int) -> str:
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"
