"""A plan as one HTML page that stands alone: no script, no font, no image from elsewhere."""

from dataclasses import replace
from html import escape

from hotset.cost.families import layer_summary
from hotset.cost.step_time import CAUSES
from hotset.errors import PlanError
from hotset.plan.explain import explain_plan
from hotset.plan.hot_set import hot_set_lines
from hotset.plan.planner import make_plan
from hotset.plan.result import Plan
from hotset.plan.search import sweep
from hotset.plan.svg import Line, Mark, Segment, line_chart, stacked_bar
from hotset.plan.text import gib, seconds

STYLE = """
:root{--ink:#1d2430;--dim:#667085;--page:#f6f7f9;--card:#fff;--rule:#e3e6ec;--rest:#eceff3;
--weights:#4c6ef5;--experts:#12a594;--kv:#f76808;--work:#9aa4b2;--reserve:#cbd2dc;--other:#ab4aba}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#98a2b3;--page:#12151b;--card:#1a1f28;
--rule:#2b323e;--rest:#262d38;--work:#667085;--reserve:#3c4656}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:940px;margin:0 auto;padding:32px 20px 56px}h1{font-size:25px;margin:0 0 4px}
h2{font-size:17px;margin:0 0 12px}p{margin:0 0 8px}.dim{color:var(--dim)}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px;
margin-top:18px}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin-top:18px}.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:14px 16px}.tiles b{display:block;font-size:23px;font-weight:650;line-height:1.2}
.tiles span{color:var(--dim);font-size:13px}svg{width:100%;height:auto;display:block}
.bar-name{margin:12px 0 4px;font-size:14px}.rest{fill:var(--rest)}
.weights{fill:var(--weights);background:var(--weights);stroke:none}
.experts{fill:var(--experts);background:var(--experts);stroke:none}
.kv{fill:var(--kv);background:var(--kv);stroke:none}.work{fill:var(--work);background:var(--work)}
.reserve{fill:var(--reserve);background:var(--reserve)}.other{fill:var(--other);
background:var(--other)}text{font:13px system-ui,sans-serif;fill:var(--ink)}.in{fill:#fff}
.tick{fill:var(--dim);font-size:12px}.axis{fill:var(--dim)}.grid{stroke:var(--rule)}
.note{font-weight:600}.line{fill:none;stroke-width:2.5}.line.weights{stroke:var(--weights)}
.line.experts{stroke:var(--experts)}.line.kv{stroke:var(--kv)}.line.other{stroke:var(--other);
stroke-dasharray:5 4}.legend{margin:8px 0 0;color:var(--dim);font-size:13px}
.legend span{margin-right:18px}.legend i{display:inline-block;width:11px;height:11px;
border-radius:3px;margin-right:6px;vertical-align:-1px}
table{width:100%;border-collapse:collapse;font-size:14px}td,th{padding:6px 8px;text-align:right;
border-bottom:1px solid var(--rule);font-variant-numeric:tabular-nums}td:first-child,
th:first-child{text-align:left}th{color:var(--dim);font-weight:500}
.share{height:9px;border-radius:3px;display:block;min-width:2px;background:var(--weights)}
td.wide{width:34%;text-align:left}pre{white-space:pre-wrap;font:12.5px/1.5 ui-monospace,monospace;
margin:0}summary{cursor:pointer;font-weight:600}
"""


def page(plan: Plan) -> str:
    """The page for one plan."""
    request, shape, workload = plan.request, plan.request.shape, plan.request.workload
    title = f"{shape.name} on {plan.gpus} x {request.hardware.name}"
    asked = f"{workload.users:,} users of {workload.context:,} tokens"
    if workload.output:
        asked += f", answers of {workload.output:,}"
    active = f", {shape.active_params / 1e9:.2f} B per token" if shape.moe_layers else ""
    hot = "\n".join(hot_set_lines(request, plan.hot_set, plan.layout.dp)).strip()
    notes = "".join(f"<p>{escape(note)}.</p>" for note in plan.notes)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{escape(str(plan.layout))} &middot; {escape(asked)} &middot; '
        f"{shape.total_params / 1e9:.2f} B parameters{active} &middot; "
        f"{escape(layer_summary(shape))}</p>",
        _tiles(plan),
        _section("Where every byte lives", _places(plan)),
        _section(f"Where a step's {seconds(plan.step.expected_s)} go", _parts(plan)),
        _section("Users against context", _users_chart(plan)),
        _section("Tokens/s against users", _rate_chart(plan)),
        _section("Hot set", f"<pre>{escape(hot)}</pre>") if hot else "",
        _section("Notes", notes) if notes else "",
        f"<section><details><summary>Every formula with its numbers</summary>"
        f"<pre>{escape(explain_plan(plan))}</pre></details></section>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: plan</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _tiles(plan: Plan) -> str:
    tiles = (
        (f"{plan.tokens_per_s:,.0f}", f"tokens/s, {plan.tokens_per_s / plan.gpus:,.0f} per GPU"),
        (seconds(plan.step.expected_s), "TPOT"),
        (seconds(plan.turn.ttft_s), "TTFT, no queue"),
        (f"{plan.users_resident:,}", "users fit in HBM"),
        (f"{plan.users_total:,}", "users fit in all tiers"),
    )
    shown = "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in tiles)
    limits = " &middot; ".join(
        f"{label}: <b>{escape(cause)}</b> ({gain:.2f}x without it)"
        for label, (cause, gain) in zip(("Bottleneck", "Runner-up"), plan.causes, strict=False)
    )
    return f'<div class="tiles">{shown}</div><p class="dim" style="margin-top:14px">{limits}</p>'


def _places(plan: Plan) -> str:
    def segment(name: str, value: float, style: str) -> Segment:
        return Segment(f"{name}: {gib(value)}", value, style)

    hbm = [
        segment("weights", plan.resident_weights_bytes, "weights"),
        segment("experts", plan.resident_experts_bytes, "experts"),
        segment("KV", plan.resident_kv_bytes, "kv"),
        segment("workspace", plan.workspace_bytes, "work"),
        segment("reserve", plan.reserve_bytes, "reserve"),
    ]
    bars = stacked_bar(
        "HBM", f"{gib(plan.hbm_bytes)}, {gib(plan.free_bytes)} free", hbm, plan.hbm_bytes
    )
    if plan.host_bytes:
        host = [
            segment("experts", plan.host_experts_bytes, "experts"),
            segment("KV", plan.host_kv_bytes, "kv"),
        ]
        left = plan.host_bytes - plan.host_experts_bytes - plan.host_kv_bytes
        bars += stacked_bar(
            "Host memory", f"{gib(plan.host_bytes)}, {gib(left)} free", host, plan.host_bytes
        )
    if plan.disk_bytes:
        disk = [segment("KV", plan.disk_kv_bytes, "kv")]
        bars += stacked_bar("Disk", gib(plan.disk_bytes), disk, plan.disk_bytes)
    legend = "".join(
        f'<span><i class="{style}"></i>{name}</span>'
        for name, style in (
            ("dense weights", "weights"),
            ("experts", "experts"),
            ("KV", "kv"),
            ("workspace", "work"),
            ("reserve", "reserve"),
        )
    )
    rows: list[tuple[str, ...]] = [("", "in HBM", "on the host", "on disk")]
    rows += [
        ("dense weights", gib(plan.resident_weights_bytes), "", ""),
        ("experts", gib(plan.resident_experts_bytes), _some(plan.host_experts_bytes), ""),
        (
            "KV",
            gib(plan.resident_kv_bytes),
            _some(plan.host_kv_bytes),
            _some(plan.disk_kv_bytes),
        ),
    ]
    copies = f", {plan.kv_copies:g} copies of it in each group" if plan.kv_copies > 1.001 else ""
    text = (
        '<p class="dim" style="margin-top:12px">KV of one user: '
        f"{gib(plan.kv_bytes_per_user)}{copies}. Weights once: "
        f"{gib(plan.request.shape.weights_bytes)}.</p>"
    )
    return f'{bars}<p class="legend">{legend}</p>{text}{_table(rows)}'


def _some(value: float) -> str:
    return gib(value) if value else ""


def _table(rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _parts(plan: Plan) -> str:
    total = plan.step.expected_s
    rows = "".join(
        f"<tr><td>{escape(CAUSES[name])}</td><td>{seconds(value)}</td><td>{value / total:.0%}</td>"
        f'<td class="wide"><span class="share" style="width:{100 * value / total:.1f}%"></span>'
        f"</td><td>{escape(plan.step.bounds.get(name, ''))}</td></tr>"
        for name, value in sorted(plan.step.parts.items(), key=lambda item: -item[1])
        if value > 0
    )
    return (
        f'<table>{rows}</table><p class="dim" style="margin-top:10px">No engine can go below '
        f"{seconds(plan.step.ceiling_s)}: nominal rates, everything overlapped, no launches.</p>"
    )


def _doubling(first: int, last: int) -> list[int]:
    values = [first]
    while values[-1] * 2 <= last:
        values.append(values[-1] * 2)
    return values


def _users_chart(plan: Plan) -> str:
    workload = plan.request.workload
    fixed = replace(
        plan.request,
        layout=plan.layout,
        workload=replace(workload, output=None, turns=1, reuse=None, users=1),
    )
    last = max(131_072, workload.context)
    points = sweep(fixed, "context", _doubling(1024, last))
    inside = [(float(p.value), float(p.plan.users_resident)) for p in points if p.plan]
    every = [(float(p.value), float(p.plan.users_total)) for p in points if p.plan]
    lines = [Line("fit in HBM", inside, "kv")]
    if any(a[1] > b[1] for a, b in zip(every, inside, strict=True)):
        lines.append(Line("fit in all tiers", every, "experts"))
    asked = f"{workload.users:,} users of {workload.context:,} tokens"
    mark = Mark(workload.context, workload.users, "other", asked, "this plan")
    return line_chart(lines, [mark], "context, tokens", "users", label="users against context")


def _rate_chart(plan: Plan) -> str:
    workload = plan.request.workload
    fixed = replace(plan.request, layout=plan.layout)
    last = max(1024, 2 * workload.users)
    try:
        points = sweep(fixed, "users", _doubling(1, last))
    except PlanError:
        return ""
    good = [(p.value, p.plan) for p in points if p.plan]
    styles: dict[str, str] = {}
    marks = []
    for users, found in good:
        cause = found.causes[0][0]
        new = cause not in styles
        styles.setdefault(cause, ("weights", "kv", "experts", "other", "work")[len(styles) % 5])
        title = f"{users:,} users: {found.tokens_per_s:,.0f} tokens/s, limited by {cause}"
        marks.append(Mark(users, found.tokens_per_s, styles[cause], title, cause if new else ""))
    here = make_plan(replace(fixed, workload=workload))
    ceiling = [(float(u), p.users_running / p.step.ceiling_s) for u, p in good]
    rates = [(float(u), p.tokens_per_s) for u, p in good]
    lines = [Line("expected", rates, "weights"), Line("ceiling", ceiling, "other")]
    chart = line_chart(lines, marks, "users", "tokens/s", label="tokens/s against users")
    legend = "".join(
        f'<span><i class="{style}"></i>limited by {escape(cause)}</span>'
        for cause, style in styles.items()
    )
    text = f"This plan: {here.tokens_per_s:,.0f} tokens/s at {workload.users:,} users."
    return f'{chart}<p class="legend">{legend}</p><p class="dim">{text}</p>'
