"""`hotset plan`: where a model lives, how many users fit, what limits them and how fast it runs."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from hotset.cli.options import Command, as_json_flag, flags
from hotset.cli.plan_options import (
    FIELDS,
    Options,
    options_of_case,
    parse_sweep,
    parse_target,
    split_cases,
)
from hotset.errors import PlanError
from hotset.plan.planner import make_plan, rank_layouts
from hotset.plan.result import Plan
from hotset.plan.serve_command import as_dict as serve_as_dict
from hotset.plan.workload import Request

EXAMPLES = ("moe-7.8x", "offload-3x")


@click.command(
    cls=Command,
    epilog="Example: hotset plan llama-3-70b --hardware h200 --gpus 2 --users 64 "
    "--max-model-len 32k",
)
@click.argument("model", required=False)
@flags("given", FIELDS.values(), dict)
@click.option(
    "--compare",
    multiple=True,
    metavar="CASE",
    help="Cases side by side, such as 'tp=8; dp=8,ep=8', 'pcie5; c2c' or "
    "'host-gib=0; host-gib=512'. May be repeated.",
)
@click.option("--sweep", metavar="RANGE", help="users=1:1024 or max-model-len=1k:128k.")
@click.option(
    "--find",
    metavar="TARGET",
    help="Best layout and split for a target, such as ttft=2s,tpot=50ms.",
)
@click.option(
    "--routing",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Place experts by what 'hotset bench --record-routing' has written. No MODEL.",
)
@click.option("--devices", type=int, help="With --routing: devices that share the experts.")
@click.option(
    "--replicas",
    type=int,
    help="With --routing: further copies of experts in each layer.  [default: --devices]",
)
@click.option("--explain", is_flag=True, help="Print each formula with its numbers filled in.")
@click.option("--example", type=click.Choice(EXAMPLES), help="Explain a quoted figure. No MODEL.")
@click.option("--list", "list_names", is_flag=True, help="List bundled models and hardware.")
@as_json_flag
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a page that stands alone.",
)
def command(
    model: str | None,
    compare: tuple[str, ...],
    sweep: str | None,
    find: str | None,
    explain: bool,
    example: str | None,
    list_names: bool,
    as_json: bool,
    html: Path | None,
    routing: Path | None,
    devices: int | None,
    replicas: int | None,
    given: dict[str, Any],
) -> None:
    """Show where MODEL would live, how many users fit and how fast it should run.

    MODEL is a bundled name, a folder, a config.json, or a hub id that is already cached. No
    weights are loaded and no network is used.
    """
    modes = {
        "--compare": compare,
        "--sweep": sweep,
        "--find": find,
        "--example": example,
        "--list": list_names,
        "--routing": routing,
    }
    _check_modes([name for name, value in modes.items() if value], explain, as_json, html)
    if routing is None and not (devices is None and replicas is None):
        raise PlanError("--devices and --replicas go with --routing FILE")
    if list_names:
        _list(as_json)
    elif routing is not None:
        _balance(routing, devices, replicas, as_json)
    elif example:
        if model is not None:
            raise PlanError(f"--example takes no MODEL, and {model} was given; leave it out")
        _example(example, as_json)
    elif model is None:
        raise PlanError("no MODEL given; try 'hotset plan llama-3-8b' or 'hotset plan --list'")
    else:
        options = Options(model=model, **given)
        if compare:
            _compare(options, compare, as_json)
        elif sweep:
            _sweep(options, sweep, as_json)
        elif find:
            _find(options, find, as_json)
        else:
            _one(options.request(), as_json, explain, html)


def _check_modes(chosen: list[str], explain: bool, as_json: bool, html: Path | None) -> None:
    if len(chosen) > 1:
        raise PlanError(f"{chosen[0]} and {chosen[1]} do not go together; use one at a time")
    if explain and (chosen or as_json):
        raise PlanError(f"--explain goes with a single case, not with {[*chosen, '--json'][0]}")
    if html and chosen:
        raise PlanError(f"--html goes with a single case, not with {chosen[0]}")


def _balance(path: Path, devices: int | None, replicas: int | None, as_json: bool) -> None:
    from hotset.cost.routing import skew_of
    from hotset.plan.balance import balance, balance_table, load_recording

    if devices is None:
        raise PlanError("--routing needs --devices N")
    if replicas is not None and replicas < 0:
        raise PlanError(f"--replicas is {replicas}; expected 0 or more")
    recording = load_recording(path)
    cases = balance(recording, devices, devices if replicas is None else replicas)
    if as_json:
        _print_json(
            {
                "about": recording.about,
                "devices": devices,
                "layers": list(recording.layers),
                "skew": asdict(skew_of(recording.history.sum(0).tolist())),
                "cases": [case.as_dict() for case in cases],
            }
        )
    else:
        click.echo(balance_table(recording, cases, devices))


def _print_json(data: dict[str, object]) -> None:
    click.echo(json.dumps(data))


def _shown(plan: Plan) -> dict[str, object]:
    """A plan as `--json` prints it."""
    return {**plan.as_dict(), "serve": serve_as_dict(plan)}


def _one(request: Request, as_json: bool, explain: bool, html: Path | None) -> None:
    """A single case; of GPUs without a layout the best one, after the three best."""
    if request.layout is not None or request.gpus in (None, 1):
        _single(make_plan(request), as_json, explain, html)
        return
    from hotset.plan.layouts import layouts_dict, layouts_table

    plans = rank_layouts(request)
    if not (as_json or explain):
        click.echo(f"{layouts_table(plans)}\n")
    _single(plans[0], as_json, explain, html, layouts_dict(plans))


def _single(
    plan: Plan,
    as_json: bool,
    explain: bool,
    html: Path | None,
    beside: dict[str, object] | None = None,
) -> None:
    if html:
        from hotset.plan.html import page

        try:
            html.write_text(page(plan), "utf-8")
        except OSError as error:
            raise PlanError(f"--html {html} cannot be written: {error.strerror}") from error
        click.echo(f"wrote {html}", err=True)
    if as_json:
        _print_json({**_shown(plan), **(beside or {})})
    elif explain:
        from hotset.plan.explain import explain_plan

        click.echo(explain_plan(plan))
    else:
        from hotset.plan.report import plan_table

        click.echo(plan_table(plan))


def _compare(options: Options, values: tuple[str, ...], as_json: bool) -> None:
    from hotset.plan.compare import compare_plans
    from hotset.plan.report import compare_table

    cases = split_cases(values)
    plans = [make_plan(options_of_case(options, case).request()) for case in cases]
    if len(cases) == 1:
        cases, plans = ["as given", *cases], [make_plan(options.request()), *plans]
    ratios = compare_plans(cases, plans)
    if as_json:
        shown = [{"case": name, **_shown(plan)} for name, plan in zip(cases, plans, strict=True)]
        _print_json(
            {**_shown(plans[0]), "cases": shown, "ratios": [asdict(ratio) for ratio in ratios]}
        )
    else:
        click.echo(compare_table(cases, plans, ratios))


def _sweep(options: Options, text: str, as_json: bool) -> None:
    from hotset.plan.report import sweep_table
    from hotset.plan.search import sweep

    field, values = parse_sweep(text)
    first: dict[str, Any] = {field: str(values[0])}
    options = replace(options, **first)
    points = sweep(options.request(), field, values)
    if as_json:
        shown = [
            {field: point.value, **(_shown(point.plan) if point.plan else {"error": point.error})}
            for point in points
        ]
        _print_json({"sweep": field, "cases": shown})
    else:
        click.echo(sweep_table(field, points))


def _find(options: Options, text: str, as_json: bool) -> None:
    from hotset.plan.report import find_table, plan_table
    from hotset.plan.search import find_best

    target = parse_target(text)
    found = find_best(options.request(), target)
    best = found[0]
    if not best.users:
        fastest = min(found, key=lambda c: c.plan.step.expected_s).plan
        raise PlanError(
            f"no layout meets {text} even for one user; the fastest, {fastest.layout}, has TTFT "
            f"{fastest.turn.ttft_s * 1e3:.0f} ms and TPOT {fastest.step.expected_s * 1e3:.1f} ms"
        )
    if as_json:
        shown = [{"users_served": c.users, **_shown(c.plan)} for c in found]
        _print_json({**_shown(best.plan), "users_served": best.users, "cases": shown})
    else:
        click.echo(find_table(text, found))
        click.echo("")
        click.echo(plan_table(best.plan))


def _example(name: str, as_json: bool) -> None:
    from hotset.plan.example_moe import moe_example
    from hotset.plan.example_offload import offload_example

    text, data = (moe_example if name == "moe-7.8x" else offload_example)()
    if as_json:
        _print_json(data)
    else:
        click.echo(text)


def _list(as_json: bool) -> None:
    from hotset.cost.catalog import bundled_models
    from hotset.cost.hardware import bundled_hardware

    models, hardware = bundled_models(), [*bundled_hardware(), "this"]
    if as_json:
        _print_json({"models": models, "hardware": hardware})
    else:
        click.echo("models:   " + ", ".join(models))
        click.echo("hardware: " + ", ".join(hardware))
