"""Plans as plain text: one plan, a comparison, a sweep with its plot, a search."""

import textwrap
from collections.abc import Iterable

from hotset.cost.families import layer_summary
from hotset.cost.step_time import CAUSES
from hotset.plan.compare import Ratio
from hotset.plan.hot_set import hot_set_lines
from hotset.plan.result import Plan
from hotset.plan.search import Candidate, SweepPoint
from hotset.plan.serve_command import serve_command, why_not_served
from hotset.plan.text import bar, gib, rows, seconds

WIDTH = 78


def plan_table(plan: Plan) -> str:
    """One plan: the model, where its bytes live, who runs, where the time goes, how to run it."""
    step = plan.step
    lines = [
        *_heading(plan),
        "",
        "Where the bytes are",
        rows(_places(plan), "  "),
        "",
        "Who runs",
        rows(
            [
                ("users whose KV fits in HBM", f"{plan.users_resident:,}", ""),
                ("users that all tiers hold", f"{plan.users_total:,}", ""),
                ("users in each step", f"{plan.users_running:,}", _mode(plan)),
            ],
            "  ",
        ),
        "",
        f"Where a step's {seconds(step.expected_s)} go (ceiling {seconds(step.ceiling_s)})",
        rows(
            [
                (
                    CAUSES[name],
                    seconds(value),
                    bar(value / step.expected_s),
                    step.bounds.get(name, ""),
                )
                for name, value in sorted(step.parts.items(), key=lambda item: -item[1])
                if value > 0
            ],
            "  ",
        ),
        "",
        *_rates(plan),
        *hot_set_lines(plan.request, plan.hot_set, plan.layout.dp),
        *_noted(plan.notes),
        "",
        *_how_to_run(plan),
    ]
    return "\n".join(lines)


def _heading(plan: Plan) -> list[str]:
    request, shape, workload = plan.request, plan.request.shape, plan.request.workload
    active = ""
    if shape.moe_layers:
        active = f", {shape.active_params / 1e9:.2f} B per token"
    asked = f"{workload.users} users of {workload.context:,} tokens"
    if workload.turns > 1:
        asked += f" in {workload.turns} turns"
    if workload.output:
        asked += f", answers of {workload.output:,}"
    copies = f", {plan.kv_copies:g} copies" if plan.kv_copies > 1.001 else ""
    state = f"{gib(shape.state_bytes)} of state, read and written in each step"
    return [
        f"{shape.name} on {plan.gpus} x {request.hardware.name}, {plan.layout}, {asked}",
        f"  {shape.total_params / 1e9:.2f} B parameters{active}; {layer_summary(shape)}",
        f"  weights {gib(shape.weights_bytes)} ({shape.matrix_dtype}); KV "
        f"{shape.kv_bytes_per_token(request.kv_dtype):,} B per token, "
        f"{gib(plan.kv_bytes_per_user)} per user ({request.kv_dtype}){copies}",
        *([f"  of a user's {gib(plan.kv_bytes_per_user)}: {state}"] if shape.state_bytes else []),
    ]


def _rates(plan: Plan) -> list[str]:
    band = plan.as_dict()["band"]
    assert isinstance(band, dict)
    lines = [
        f"Tokens/s   {plan.tokens_per_s:,.0f}, {plan.tokens_per_s / plan.gpus:,.0f} per GPU "
        f"(engines differ: {band['low']:,.0f} to {band['high']:,.0f})",
        f"TPOT       {seconds(plan.step.expected_s)}",
        f"TTFT       {seconds(plan.turn.ttft_s)} without queueing" + _reuse(plan),
    ]
    for label, (cause, gain) in zip(("Bottleneck", "Runner-up"), plan.causes, strict=False):
        lines.append(f"{label:<10} {cause}: {_gain(gain)} tokens/s without it")
    return lines


def _how_to_run(plan: Plan) -> list[str]:
    command = serve_command(plan)
    if command is None:
        return _noted([f"no command to run it: {why_not_served(plan)}"])
    return ["To run it", f"  {command}"]


def _noted(notes: Iterable[str]) -> list[str]:
    return [textwrap.fill(f"Note: {note}", WIDTH, subsequent_indent="  ") for note in notes]


def _gain(gain: float) -> str:
    return f"{gain:.2f}x" if gain < 1000 else "over 1000x"


def _mode(plan: Plan) -> str:
    asked = plan.request.workload.users
    return {
        "resident": "all of them" if plan.users_running == asked else "more would be slower",
        "park": "the others are parked in a slower tier and take turns",
        "wait": "the others wait outside: no tier holds them",
        "stream": f"{plan.streamed_kv_share:.0%} of their KV is read over the link each step",
    }[plan.mode]


def _reuse(plan: Plan) -> str:
    if not plan.turn.found:
        return ""
    text = f"; {plan.turn.found:,.0f} of {plan.request.workload.prompt_tokens:,.0f} prompt tokens"
    text += f" found, loaded in {seconds(plan.turn.load_s)}"
    if plan.turn.recomputed:
        text += f" while {plan.turn.recomputed:,} are computed again"
    return text


def _places(plan: Plan) -> list[tuple[str, ...]]:
    hbm = plan.hbm_bytes
    parts = [
        ("HBM: dense weights", plan.resident_weights_bytes),
        ("HBM: experts", plan.resident_experts_bytes),
        ("HBM: KV", plan.resident_kv_bytes),
        ("HBM: workspace", plan.workspace_bytes),
        ("HBM: reserve", plan.reserve_bytes),
        ("HBM: free", plan.free_bytes),
    ]
    table: list[tuple[str, ...]] = [
        (name, gib(value), bar(value / hbm), f"{value / hbm:.0%}") for name, value in parts if value
    ]
    below = [
        ("host: experts", plan.host_experts_bytes, plan.host_bytes),
        ("host: KV", plan.host_kv_bytes, plan.host_bytes),
        ("disk: KV", plan.disk_kv_bytes, plan.disk_bytes),
    ]
    for name, value, size in below:
        if value:
            table.append((name, gib(value), bar(value / size), f"{value / size:.0%}"))
    return table


def compare_table(names: list[str], plans: list[Plan], ratios: list[Ratio]) -> str:
    """Cases as columns, and each ratio split."""
    lines: list[tuple[str, ...]] = [("", *names)]

    def row(label: str, texts: list[str]) -> None:
        lines.append((label, *texts))

    row("layout", [f"{p.gpus} x {p.layout}" for p in plans])
    row("host link", [p.request.hardware.host_link for p in plans])
    row("KV per user", [gib(p.kv_bytes_per_user) for p in plans])
    row("KV copies", [f"{p.kv_copies:g}" for p in plans])
    row("users resident", [f"{p.users_resident:,}" for p in plans])
    row("users in all tiers", [f"{p.users_total:,}" for p in plans])
    row("users in a step", [f"{p.users_running:,}" for p in plans])
    row("experts resident", [f"{p.resident_expert_share:.0%}" for p in plans])
    row("TPOT", [seconds(p.step.expected_s) for p in plans])
    row("TTFT", [seconds(p.turn.ttft_s) for p in plans])
    row("tokens/s", [f"{p.tokens_per_s:,.0f}" for p in plans])
    row("tokens/s per GPU", [f"{p.tokens_per_s / p.gpus:,.0f}" for p in plans])
    row("bottleneck", [p.causes[0][0] for p in plans])
    row("runner-up", [p.causes[1][0] for p in plans])
    text = rows(lines) + "\n"
    for ratio in ratios:
        text += (
            f"\n{ratio.case} over {names[0]}: {ratio.tokens_per_s_per_gpu:.2f}x tokens/s per GPU = "
            f"{ratio.capacity:.2f}x from capacity (users at once) times {ratio.speed:.2f}x from "
            f"speed (same users); TPOT {ratio.tpot:.2f}x, TTFT {ratio.ttft:.2f}x"
        )
    return text


def sweep_table(field: str, points: list[SweepPoint]) -> str:
    """A table of the sweep, and tokens/s as a plot."""
    good = [point.plan for point in points if point.plan]
    first = good[0]
    head = (field, "in a step", "tokens/s", "TPOT", "TTFT", "KV total", "bottleneck")
    table: list[tuple[str, ...]] = [head]
    for point in points:
        if point.plan is None:
            table.append((f"{point.value:,}", "-", "-", "-", "-", "-", "does not fit"))
            continue
        p = point.plan
        table.append(
            (
                f"{point.value:,}",
                f"{p.users_running:,}",
                f"{p.tokens_per_s:,.0f}",
                seconds(p.step.expected_s),
                seconds(p.turn.ttft_s),
                gib(p.kv_bytes_per_user * p.request.workload.users),
                p.causes[0][0],
            )
        )
    most = max(p.tokens_per_s for p in good)
    plot = [
        (
            f"{point.value:,}",
            f"{point.plan.tokens_per_s:,.0f}" if point.plan else "-",
            bar(point.plan.tokens_per_s / most, 44).replace(".", " ") if point.plan else "",
        )
        for point in points
    ]
    title = f"{first.request.shape.name} on {first.gpus} x {first.request.hardware.name}"
    lines = [f"{title}, {first.layout}", "", rows(table), "", f"tokens/s against {field}"]
    lines += [rows([(a, b, "|" + c) for a, b, c in plot], "  ")]
    return "\n".join(lines)


def find_table(target: str, found: list[Candidate]) -> str:
    """Layouts, best first."""
    head = ("layout", "GPUs", "users", "tokens/s per GPU", "TPOT", "TTFT", "experts", "KV")
    table: list[tuple[str, ...]] = [head]
    for c in found[:12]:
        p = c.plan
        table.append(
            (
                str(p.layout),
                str(p.gpus),
                f"{c.users:,}" if c.users else "misses it",
                f"{p.tokens_per_s / p.gpus:,.0f}",
                seconds(p.step.expected_s),
                seconds(p.turn.ttft_s),
                f"{p.resident_expert_share:.0%}" if p.request.shape.moe_layers else "-",
                gib(p.resident_kv_bytes),
            )
        )
    left = f"\n... and {len(found) - 12} more" if len(found) > 12 else ""
    return f"Layouts for {target}, best first\n{rows(table)}{left}"
