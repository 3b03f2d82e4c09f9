"""The replicas of a fleet, and where requests went, for `hotset top`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hotset.cli.top_text import short_seconds

Json = dict[str, Any]

_STATES = {
    "serving": "green3",
    "draining": "orange1",
    "connecting": "grey62",
    "lost": "red",
}
_NUM_LINES = 7  # of the panel, beside those of replicas
_WIDE, _WIDEST = 110, 150  # columns from which on more of a replica is shown


def fleet_lines(fleet: Json) -> int:
    """The height of the panel, about: the last lines may be broken."""
    replicas = fleet["replicas"]
    return _NUM_LINES + len(replicas) + sum(bool(one["why"]) for one in replicas)


def fleet_panel(fleet: Json, width: int) -> RenderableType:
    """A line for each replica, then what was done with requests."""
    replicas = fleet["replicas"]
    tiers = list(dict.fromkeys(tier["name"] for one in replicas for tier in one["tiers"]))
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
    table.add_column("replica", no_wrap=True)
    names = ["tokens/s", "moving"]
    names += ["others", "queued", "found"] if width >= _WIDE else []
    for name in (*names, *tiers, "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    if width >= _WIDEST:
        table.add_column("why", no_wrap=True)
    for one in replicas:
        table.add_row(*_row(one, tiers, width))
    reasons = [
        Text(f"{one['id']}: {one['why']}", style="red", no_wrap=True, overflow="ellipsis")
        for one in replicas
        if one["why"]
    ]
    title = f"replicas, routed by {fleet['route']}"
    return Panel(
        Group(table, *reasons, _choices(fleet), _moves(fleet)), title=title, title_align="left"
    )


def _row(one: Json, tiers: list[str], width: int) -> list[Text]:
    name = Text("● ", style=_STATES.get(one["state"], "red")).append(one["id"], style="default")
    if one["state"] != "serving":
        name.append(f" {one['state']} {one['since_s']:.0f} s", style="dim")
    users = one["users"]
    cells = [f"{one['output_tokens_per_s']:,.0f}", f"{users['moving']:,}"]
    if width >= _WIDE:
        cells.append(f"{sum(users.values()) - users['moving']:,}")
        cells.append(f"{one['queued_tokens']:,}")
        cells.append(_share(one["found_tokens"], one["prompt_tokens"]))
    own = {tier["name"]: _share(tier["used"], tier["capacity"]) for tier in one["tiers"]}
    cells += [own.get(tier, "-") for tier in tiers]
    cells.append(f"{sum(one['routed'].values()):,}")
    if width >= _WIDEST:
        cells.append(_counts(one["routed"]))
    return [name, *map(Text, cells)]


def _choices(fleet: Json) -> Text:
    expected, found, number = (
        fleet[name] for name in ("predicted_tokens", "found_tokens", "num_predicted")
    )
    text = Text("went: ", style="dim").append(_counts(fleet["routed"]) or "none", style="default")
    if expected:
        text.append("  found of expected: ").append(_share(found, expected), style="default")
    if number:
        means = (
            short_seconds(fleet[name] / number) for name in ("predicted_ttft_s", "real_ttft_s")
        )
        text.append("  first token expected, came: ").append(", ".join(means), style="default")
    return text


def _moves(fleet: Json) -> Text:
    text = Text(style="dim")
    for label, key in (
        ("again before the first token", "retried"),
        ("  went on elsewhere", "resumed"),
        ("  ended with an error", "given_up"),
    ):
        text.append(f"{label}: ").append(_counts(fleet[key]) or "0", style="default")
    pause = fleet["pause_s"]
    if pause["p50"] is not None:
        text.append("  pause p50, p99: ").append(
            f"{short_seconds(pause['p50'])}, {short_seconds(pause['p99'])}", style="default"
        )
    for name in ("lost", "silent", "drains"):
        text.append(f"  {name}: ").append(f"{fleet[name]:,}", style="default")
    return text


def _share(part: float, of: float) -> str:
    return f"{part / of:.0%}" if of else "-"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
