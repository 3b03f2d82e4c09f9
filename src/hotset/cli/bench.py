"""`hotset bench`: whether tiering pays here."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.bench.presets import DEFAULTS, PRESETS, Preset
from hotset.bench.workload import Spec
from hotset.cli.options import (
    Command,
    as_json_flag,
    check_writable,
    engine_options,
    flags,
    given_only,
)
from hotset.cli.progress import make_say
from hotset.cost.selection import GUESSED
from hotset.errors import ConfigError
from hotset.expert_options import ExpertBudget, ExpertSlots
from hotset.option_fields import options_of
from hotset.options import Options

if TYPE_CHECKING:
    from hotset.bench.campaign import Order
    from hotset.bench.result import BenchResult

_FIGURES = [replace(one, default=None) for one in options_of(Spec)]  # None is not given
WORKLOADS = {one.name: one.choices for one in _FIGURES}["workload"]


def _list_presets(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    for name, preset in PRESETS.items():
        click.echo(f"{name:<9} {preset.about}")
    ctx.exit()


@click.command(cls=Command)
@click.argument("workload", type=click.Choice(WORKLOADS), required=False)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Shapes and sizes by name.")
@click.option(
    "--list-presets",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_list_presets,
    help="Show what each preset is.",
)
@flags("figures", _FIGURES, given_only)
@click.option(
    "--arms",
    default=None,
    help="Some of hot,host,host+disk,resident,experts,hot-set.  [default: the preset's; hot,host; "
    "resident,experts with --expert-slots or --expert-gib; none with --against]",
)
@click.option("--repeats", type=click.IntRange(1, 100), default=1, show_default=True)
@click.option("--against", metavar="URL", help="Send the same work to an OpenAI-compatible server.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="For --against.  [env: OPENAI_API_KEY]")
@click.option("--against-model", help="Name at the server.  [default: the first it lists]")
@click.option(
    "--vocab-size", type=click.IntRange(8), help="For --against, of a model unknown here."
)
@click.option(
    "--dummy-weights", is_flag=True, help="Random weights of a shape: see hotset plan --list."
)
@click.option(
    "--router-skew",
    type=click.FloatRange(0, 4),
    help="With random weights: use experts evenly (0) or unevenly (0.45 is as measured on "
    "Qwen3-30B-A3B, see docs/moe_study.md).  [default: as it comes]",
)
@click.option(
    "--hardware", metavar="NAME|FILE|this", help="Profile that predictions are made with."
)
@click.option("--verify", is_flag=True, help="Compare the answers of all arms, token by token.")
@click.option(
    "--profile",
    "profile_steps",
    type=click.IntRange(1, 1000),
    is_flag=False,
    flag_value=20,
    metavar="[STEPS]",
    help="Show where the time of this many steps (20) goes.",
)
@click.option(
    "--record-routing",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to which experts the tokens of each step of the first run went, as .npz or .json; "
    "see hotset plan --routing.",
)
@click.option(
    "--record-selection",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write which tokens decodes of the first run selected, layer by layer, as .npz; see "
    "hotset plan --selection. For sparse attention.",
)
@click.option(
    "--steady-steps",
    type=click.IntRange(0, 100_000),
    help="Put prompts in place, random and not computed, and time this many decode steps once as "
    "many requests run as will; 0 plays all of the work. For sparse attention.",
)
@click.option(
    "--selection-overlap",
    type=click.FloatRange(0, 0.98, min_open=True),
    help="Draw what sparse attention selects: this share of it is in the next step's too.",
)
@click.option(
    "--selection-guessed",
    type=click.FloatRange(0, 0.98, min_open=True),
    default=GUESSED,
    show_default=True,
    help="With --selection-overlap: draw what --row-prefetch 2 guesses, too; this share of what a "
    "layer selects is in its guess.",
)
@click.option("--no-wait", is_flag=True, help="Start while host memory is still being pinned.")
@click.option("--max-s", type=float, help="End each run after this many seconds, done or not.")
@as_json_flag
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the JSON there too, after each run.",
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page that stands alone.",
)
@engine_options
def command(
    workload: str | None,
    file: Path | None,
    preset: str | None,
    figures: dict[str, Any],
    dummy_weights: bool,
    as_json: bool,
    out: Path | None,
    html: Path | None,
    options: Options,
    **given: Any,
) -> None:
    r"""Run the same work with and without tiers, side by side, and say whether tiering paid.

    WORKLOAD is one of unshared, pressure, multiturn, shared-prefix, or trace with a FILE in
    Mooncake's format. Prompts are random tokens; answers go on past end tokens.
    Sizes that are not given are made to fit the workload: see docs/bench.md.

    \b
    Example:
      hotset bench multiturn --arms hot,host,host+disk --html bench.html
      hotset bench --preset C6 --arms hot,host --out c6.json
      hotset bench multiturn --against http://127.0.0.1:8000
    """
    chosen = _choose(workload, file, preset, figures)
    options, dummy_weights = _with_preset(options, chosen, dummy_weights)
    check_writable(out, html, given["record_routing"], given["record_selection"])
    from hotset.bench.campaign import run_bench

    def keep(result: "BenchResult") -> None:
        if out is not None:
            out.write_text(json.dumps(result.as_dict()) + "\n", "utf-8")

    result = run_bench(_order(chosen, options, dummy_weights, **given), make_say(), keep)
    if html is not None:
        from hotset.bench.html import page

        html.write_text(page(result), "utf-8")
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(json.dumps(result.as_dict()))
    else:
        from hotset.bench.report import text

        click.echo(text(result))
    if result.failures or any(not run.is_complete for run in result.runs):
        sys.exit(1)


def _order(
    chosen: Preset,
    options: Options,
    dummy_weights: bool,
    *,
    arms: str | None,
    repeats: int,
    against: str | None,
    against_model: str | None,
    api_key: str | None,
    vocab_size: int | None,
    no_wait: bool,
    profile_steps: int | None,
    **run: Any,
) -> "Order":
    """What to run; `run` has fields of `RunOptions`."""
    # What the command line leaves open is as the preset has it.
    run |= {name: value for name, value in chosen.run.items() if run[name] is None}
    max_s, recording, selection = run["max_s"], run["record_routing"], run["record_selection"]
    if max_s is not None and not max_s > 0:
        raise ConfigError(f"max_s is {max_s}; expected seconds above 0")
    if recording is not None and recording.suffix not in (".npz", ".json"):
        raise ConfigError(f"record_routing is {recording}; expected a .npz or .json file")
    if selection is not None and selection.suffix != ".npz":
        raise ConfigError(f"record_selection is {selection}; expected a .npz file")
    if (steps := run["steady_steps"]) and steps >= chosen.spec.output_tokens:
        raise ConfigError(
            f"steady_steps is {steps}, but answers of {chosen.spec.output_tokens} tokens end "
            f"before; give fewer, or more output_tokens"
        )
    from hotset.bench.arms import parse_arms
    from hotset.bench.campaign import Order, Target
    from hotset.bench.runs import RunOptions

    target = None
    if against is not None:
        target = Target(against, model=against_model, key=api_key, vocab_size=vocab_size)
    return Order(
        spec=chosen.spec,
        config=options,
        dummy_weights=dummy_weights,
        arms=parse_arms(arms) if arms is not None else _arms(chosen, options, against),
        repeats=repeats,
        options=RunOptions(profile_steps or 0, wait_for_tiers=not no_wait, **run),
        target=target,
    )


def _choose(
    workload: str | None, file: Path | None, preset: str | None, figures: dict[str, Any]
) -> Preset:
    """The preset, or the defaults of the workload, with what the user has given."""
    if (workload is None) == (preset is None):
        raise ConfigError(
            f"give a workload ({', '.join(WORKLOADS)}) or a --preset (see --list-presets)"
            + ("" if workload is None else ", not both")
        )
    if preset is not None:
        if file is not None:
            raise ConfigError("a --preset takes no file")
        base = PRESETS[preset]
        return replace(base, spec=replace(base.spec, **figures))
    if workload == "trace":
        if file is None:
            raise ConfigError("the workload `trace` needs a file: hotset bench trace FILE")
        return Preset(Spec("trace", trace=file, **figures), "")
    if file is not None:
        raise ConfigError(f"the workload `{workload}` takes no file")
    assert workload is not None
    return Preset(replace(DEFAULTS[workload], **figures), "")


def _arms(preset: Preset, options: Options, against: str | None) -> list[str]:
    """What runs where no arms are named."""
    from hotset.bench.arms import why_not_with_resident

    if against is not None:
        return []
    if options.memory.total_gib is not None and "resident" in preset.arms:
        return ["experts"]
    if not isinstance(options.experts, ExpertSlots | ExpertBudget):
        return list(preset.arms)
    return ["resident", "experts"] if why_not_with_resident(options) is None else ["experts"]


def _with_preset(options: Options, preset: Preset, dummy_weights: bool) -> tuple[Options, bool]:
    """What the command line leaves open is as the preset has it."""
    context = click.get_current_context()

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source is not click.core.ParameterSource.DEFAULT

    hot_gib = preset.hot_gib if options.memory.total_gib is None else None
    sizes = {"hot_gib": hot_gib, "host_gib": preset.host_gib, "disk_gib": preset.disk_gib}
    changes = {
        name: value
        for name, value in (sizes | preset.engine).items()
        if not is_given(name) and value is not None
    }
    if preset.model is not None and not is_given("model"):
        changes["model"] = preset.model
        dummy_weights = True
    return options.but(**changes), dummy_weights
