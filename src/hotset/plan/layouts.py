"""The best layouts of a number of GPUs, and why the first one wins. Imports no torch."""

from collections.abc import Callable

from hotset.cost.step_time import CAUSES
from hotset.layout import Layout
from hotset.plan.compare import compare_plans
from hotset.plan.result import Plan
from hotset.plan.serve_command import why_not_served
from hotset.plan.text import gib, rows, seconds

MOST_SHOWN = 3
_EQUAL = 0.995  # of the tokens/s of the best: less is within what the model may be off


def layouts_table(plans: list[Plan]) -> str:
    """The three best layouts, and one line that says why the first is the best."""
    return f"{_table(plans, 'served', why_not_served)}\nWhy: {why_best(plans)}"


def choice_text(plans: list[Plan], found: list[Plan]) -> str:
    """The three best layouts for an engine, and why it takes the first of `found`, which it can."""
    first, best, workload = found[0], plans[0], plans[0].request.workload
    runs = [plan.layout for plan in found]
    table = _table(plans, "runs", lambda plan: "" if plan.layout in runs else "no")
    why = f"the only layout of {first.gpus} GPUs that this engine runs here"
    if len(found) > 1:
        why = why_best(found)
    lines = [
        table,
        f"takes {first.layout} for {workload.users:,} users of {workload.context:,} tokens: {why}",
    ]
    if first.tokens_per_s < _EQUAL * best.tokens_per_s:
        ratio = best.tokens_per_s / first.tokens_per_s
        how = "which this engine cannot run yet"
        if best.layout == Layout(best.layout.tp, best.layout.dp):
            one = f" --tp {best.layout.tp}" if best.layout.tp > 1 else ""
            how = f"as separate engines: hotset fleet --replicas {best.layout.dp}{one}"
        lines.append(f"{best.layout} should give {ratio:.2f} times the tokens/s, {how}")
    return "\n".join(lines)


def _table(plans: list[Plan], word: str, why_not: Callable[[Plan], str]) -> str:
    first = plans[0]
    table = [("", "tokens/s", "TPOT", "users in HBM", "HBM per GPU", word, "most time")]
    for plan in plans[:MOST_SHOWN]:
        table.append(
            (
                str(plan.layout),
                f"{plan.tokens_per_s:,.0f}",
                seconds(plan.step.expected_s),
                f"{plan.users_resident:,}",
                gib(_used_bytes(plan)),
                "no" if why_not(plan) else "yes",
                CAUSES[_slowest(plan)],
            )
        )
    title = f"Layouts of {first.gpus} x {first.request.hardware.name}, best first"
    return f"{title}\n{rows(table, '  ')}"


def layouts_dict(plans: list[Plan]) -> dict[str, object]:
    """For `--json`: the same."""
    return {
        "layouts": [
            {
                "layout": str(plan.layout),
                "tokens_per_s": plan.tokens_per_s,
                "tpot_s": plan.step.expected_s,
                "users_resident": plan.users_resident,
                "hbm_bytes_per_gpu": round(_used_bytes(plan)),
                "why_not_served": why_not_served(plan) or None,
                "most_time": CAUSES[_slowest(plan)],
            }
            for plan in plans[:MOST_SHOWN]
        ],
        "why": why_best(plans),
    }


def why_best(plans: list[Plan]) -> str:
    """Why the first layout is faster than the second one."""
    first, *others = plans
    if not others:
        return f"{first.layout} is the only layout of {first.gpus} GPUs that holds the model"
    slower = [plan for plan in others if plan.tokens_per_s < _EQUAL * first.tokens_per_s]
    reason = _why(first, slower[0]) if slower else ""
    if slower and slower[0] is others[0]:
        return reason
    return f"{first.layout} and {others[0].layout} are equally fast" + (reason and f"; {reason}")


def _why(first: Plan, slower: Plan) -> str:
    """More users at once, or which part of a step."""
    [ratio] = compare_plans(["", ""], [slower, first])
    if ratio.capacity > max(1.0, ratio.speed):
        return (
            f"{first.layout} runs {first.users_running:,} users at once, {slower.layout} "
            f"{slower.users_running:,}"
        )
    parts, slower_parts = first.step.parts, slower.step.parts
    cause = max(parts, key=lambda name: slower_parts[name] - parts[name])
    return (
        f"{first.layout} takes {seconds(first.step.expected_s)} per step, {seconds(parts[cause])} "
        f"of them {CAUSES[cause]}; {slower.layout} takes {seconds(slower.step.expected_s)}, "
        f"{seconds(slower_parts[cause])} of them for that"
    )


def _slowest(plan: Plan) -> str:
    return max(plan.step.parts, key=lambda name: plan.step.parts[name])


def _used_bytes(plan: Plan) -> float:
    """HBM of each GPU that weights, experts, KV and workspace take."""
    return (plan.hbm_bytes - plan.free_bytes - plan.reserve_bytes) / plan.gpus
