"""The results as one HTML page that stands alone: no script, no font, no image from elsewhere."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from hotset.bench.charts import Bar, bar_chart, chart
from hotset.bench.report import number, rows, verification_line
from hotset.bench.result import ArmRun, BenchResult
from hotset.bench.verdict import fetched_share, fetched_tokens, link_busy_s
from hotset.plan.html import STYLE
from hotset.plan.svg import Limit, Line

_STYLE = """
.verdict{font-size:17px;line-height:1.45;margin:14px 0 0}.limit{stroke-width:1.5;
stroke-dasharray:2 4;fill:none;stroke:var(--dim)}.expected{stroke:var(--ink);stroke-width:2.5}
.line.work{stroke:var(--work)}.line.other{stroke-dasharray:none}h3{font-size:15px;margin:18px 0 6px}
.scroll{overflow-x:auto}.scroll td,.scroll th{white-space:nowrap}code{font:13px ui-monospace,
monospace;overflow-wrap:anywhere}.bad{color:#d92d20}
"""
_ARM_STYLES = ("weights", "kv", "experts", "other", "work")
_GB = 1e9


def page(result: BenchResult) -> str:
    """The page for the results of one call."""
    runs = [result.typical(arm) for arm in result.arms]
    styles = {arm: _ARM_STYLES[i % len(_ARM_STYLES)] for i, arm in enumerate(result.arms)}
    machine = result.machine
    where = [gpu["name"] for gpu in machine["gpus"]] or [machine["cpu"]]
    model = result.asked.get("model")
    about = [*where, *([f"{model}, {result.asked['dtype']}"] if model else [])]
    body = [
        f"<h1>{escape(result.title)}</h1>",
        f'<p class="dim">{" &middot; ".join(escape(part) for part in about)}</p>',
        f'<p class="verdict">{escape(result.verdict.replace("`", ""))}</p>',
        _failures(result),
        _tiles(result),
        _section("Throughput", _throughput(runs, styles)),
        _section("Time to first token", _ttft(runs, styles)),
        *(_section(f"Over time: {run.arm}", _over_time(run)) for run in runs if run.samples),
        _section("Predicted and measured", _predictions(runs)),
        _section("All figures", _figures(result)),
        _section("How it was made", _making(result)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(result.title)}: bench</title><style>{STYLE}{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _failures(result: BenchResult) -> str:
    lines = [f"{f.arm}, round {f.repeat + 1}: {f.reason}" for f in result.failures]
    lines += [
        f"{run.arm}: {run.failed} requests failed: {run.first_error}"
        for run in result.runs
        if run.failed
    ]
    return "".join(f'<p class="bad">{escape(line)}</p>' for line in lines)


def _tiles(result: BenchResult) -> str:
    runs = [result.typical(arm) for arm in result.arms]
    best = max(runs, key=lambda run: run.total_tokens_per_s)
    tiles = [
        (f"{best.total_tokens_per_s:,.0f}", f"total tokens/s, {best.arm}"),
        (f"{best.wall_s:.1f} s", f"wall, {best.arm}"),
    ]
    ratio = result.ratio(best.arm)
    if ratio is not None and best.arm != result.baseline:
        tiles.insert(0, (f"{ratio:.2f}", f"times as fast as {result.baseline}: {best.arm}"))
    if best.latency("ttft_s", "mean") is not None:
        tiles.append((f"{best.latency('ttft_s', 'mean'):.2f} s", f"mean TTFT, {best.arm}"))
    if best.engine:
        tiles.append((f"{fetched_share(best):.0%}", f"of prompt tokens fetched, {best.arm}"))
    for run in runs:
        rate = run.engine.get("expert_hit_rate")
        if rate is not None:
            tiles.append((f"{rate:.0%}", f"of needed experts were on the device, {run.arm}"))
    shown = "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in tiles)
    return f'<div class="tiles">{shown}</div>'


def _throughput(runs: list[ArmRun], styles: dict[str, str]) -> str:
    def bars(name: str) -> list[Bar]:
        return [
            Bar(
                run.arm,
                getattr(run, name),
                run.prediction[name] if run.prediction else None,
                styles[run.arm],
            )
            for run in runs
        ]

    expected = any(run.prediction for run in runs)
    note = '<p class="dim">The upright line is what the cost model expects.</p>' if expected else ""
    return (
        "<h3>Total tokens/s: prompts, reused or not, and answers</h3>"
        + bar_chart(bars("total_tokens_per_s"), label="total tokens/s by arm", digits=0)
        + "<h3>Output tokens/s</h3>"
        + bar_chart(bars("output_tokens_per_s"), label="output tokens/s by arm", digits=1)
        + note
    )


def _ttft(runs: list[ArmRun], styles: dict[str, str]) -> str:
    parts = []
    for figure in ("mean", "p99"):
        bars = [
            Bar(run.arm, value, None, styles[run.arm])
            for run in runs
            if (value := run.latency("ttft_s", figure)) is not None
        ]
        if bars:
            chart_ = bar_chart(bars, label=f"{figure} TTFT by arm", digits=2)
            parts.append(f"<h3>{figure}, seconds</h3>{chart_}")
    most = max((len(run.ttft_by_turn_s) for run in runs), default=0)
    if most > 1:
        lines = [
            Line(
                run.arm,
                [(float(turn), value) for turn, value in enumerate(run.ttft_by_turn_s, 1)],
                styles[run.arm],
            )
            for run in runs
        ]
        turns = [float(turn) for turn in range(1, most + 1, -(-most // 16))]
        parts.append("<h3>Mean by turn</h3>")
        parts.append(chart(lines, [], "turn", "TTFT, s", label="mean TTFT by turn", x_ticks=turns))
    return "".join(parts)


def _over_time(run: ArmRun) -> str:
    times, sizes, samples = run.samples["t_s"], run.sizes, run.samples

    def line(name: str, column: str, style: str, unit: float = _GB) -> Line:
        points = [(t, value / unit) for t, value in zip(times, samples[column], strict=True)]
        return Line(name, points, style)

    lines = [line("device, in use", "device_held", "weights")]
    lines.append(line("device, cached", "device_cached", "work"))
    limits = [Limit("hot tier", sizes["hot_bytes"] / _GB)]
    for tier, style in (("host", "kv"), ("disk", "experts")):
        if any(samples[f"{tier}_used"]):
            lines.append(line(tier, f"{tier}_used", style))
            limits.append(Limit(f"{tier} tier", sizes[f"{tier}_bytes"] / _GB))
    top = 3 * max(max(y for _, y in one.points) for one in lines)
    limits = [limit for limit in limits if limit.value <= top]  # a far one would flatten the rest
    users = [
        line(name, name, style, 1) for name, style in (("running", "weights"), ("waiting", "work"))
    ]
    return (
        "<h3>Where the bytes of KV lived, GB</h3>"
        + chart(lines, limits, "seconds", "GB", label=f"KV by tier, {run.arm}")
        + _links(run)
        + "<h3>Requests</h3>"
        + chart(users, [], "seconds", "requests", label=f"requests, {run.arm}")
    )


def _links(run: ArmRun) -> str:
    """Use of the links; empty where nothing was moved, or no rate is known."""
    rate = run.sizes.get("link_bytes_per_s", {}).get("host")
    if not rate or not any(run.samples["to_host"]):
        return ""
    moves = [
        Line(name, rates(run.samples["t_s"], run.samples[column]), style)
        for name, column, style in (
            ("to the device", "to_device", "kv"),
            ("to the host", "to_host", "weights"),
            ("from disk", "from_disk", "experts"),
            ("to disk", "to_disk", "other"),
        )
        if "disk" not in column or any(run.samples[column])
    ]
    peak = max((y for move in moves for _, y in move.points), default=0.0)
    text = f"measured limit to the device, {rate / _GB:.1f} GB/s"
    limits = [Limit(text, rate / _GB)] if rate / _GB <= 10 * peak else []
    return (
        "<h3>Use of the links, GB/s</h3>"
        + chart(moves, limits, "seconds", "GB/s", label=f"link use, {run.arm}")
        + f'<p class="dim">Bytes to the device would take the link {link_busy_s(run):.2f} s of '
        f"the {run.wall_s:.2f} s at the {rate / _GB:.1f} GB/s measured at start"
        f"{'' if limits else ', a limit far above this chart'}.</p>"
    )


def rates(times: list[float], totals: list[float]) -> list[tuple[float, float]]:
    """GB/s between samples, over windows of a hundredth of the run, but 0.2 s at least."""
    window_s = max(0.2, times[-1] / 100)
    points = []
    last = 0
    for i in range(1, len(times)):
        seconds = times[i] - times[last]
        if seconds >= window_s:
            points.append((times[i], (totals[i] - totals[last]) / seconds / _GB))
            last = i
    return points


def _predictions(runs: list[ArmRun]) -> str:
    known = [run for run in runs if run.prediction]
    if not known:
        return ""
    lines: list[tuple[str, str, int, Any]] = [
        ("wall, s", "wall_s", 2, lambda run: run.wall_s),
        ("total tokens/s", "total_tokens_per_s", 0, lambda run: run.total_tokens_per_s),
        ("output tokens/s", "output_tokens_per_s", 1, lambda run: run.output_tokens_per_s),
        ("mean TTFT, s", "ttft_s", 2, lambda run: run.latency("ttft_s", "mean")),
        ("tokens computed", "computed_tokens", 0, lambda run: run.count("computed_tokens")),
        ("tokens fetched", "fetched_tokens", 0, fetched_tokens),
        ("link busy, s", "link_s", 2, link_busy_s),
        ("  prefill, s", "prefill_s", 2, lambda run: None),
        ("  decode, s", "decode_s", 2, lambda run: None),
    ]
    head = [word for run in known for word in (f"{run.arm}: expected", "measured", "error")]
    table = []
    for label, key, digits, measure in lines:
        cells = []
        for run in known:
            assert run.prediction is not None
            expected, measured = run.prediction[key], measure(run)
            known_both = expected is not None and measured
            cells += [number(expected, digits), number(measured, digits)]
            cells.append(f"{expected / measured - 1:+.0%}" if known_both else "")
        table.append((label, cells))
    assert known[0].prediction is not None
    hardware = escape(known[0].prediction["hardware"])
    return (
        _table(head, table)
        + f'<p class="dim" style="margin-top:10px">By the cost model of <code>hotset plan</code> '
        f"with the profile {hardware}. A tier is taken to find all again where it holds the "
        "contexts of all sessions, and nothing where it does not: they come back in the order in "
        "which they went, and the least recently used are evicted.</p>"
    )


def _figures(result: BenchResult) -> str:
    notes = dict.fromkeys(note for run in result.runs for note in run.notes)
    lines = [*notes, *result.asked.get("notes", [])]
    if result.verification is not None:
        lines.append(verification_line(result))
    shown = "".join(f'<p class="dim" style="margin-top:8px">{escape(line)}</p>' for line in lines)
    return _table(result.arms, rows(result)) + shown


def _table(head: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    def row(tag: str, label: str, cells: Sequence[str]) -> str:
        shown = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in (label, *cells))
        return f"<tr>{shown}</tr>"

    body = "".join(row("td", *line) for line in lines)
    return f'<div class="scroll"><table>{row("th", "", head)}{body}</table></div>'


def _making(result: BenchResult) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = {
        "command": machine["command"],
        "workload": json.dumps(result.asked["workload"]),
        "engine": json.dumps(result.asked["engine"]),
        "commit": machine["commit"] or "unknown",
        "versions": versions,
        "hardware": f"{machine['cpu']}, {machine['cpu_cores']} cores, "
        f"{machine['host_memory_bytes'] / _GB:.0f} GB"
        + "".join(
            f"; {gpu['name']}, {gpu['memory_bytes'] / _GB:.0f} GB" for gpu in machine["gpus"]
        ),
    }
    shown = "".join(f"<p>{name}: <code>{escape(text)}</code></p>" for name, text in facts.items())
    for arm in result.arms:
        report = result.typical(arm).budget_report
        if report:
            shown += (
                f"<details><summary>Memory of {escape(arm)}</summary>"
                f"<pre>{escape(report)}</pre></details>"
            )
    return shown
