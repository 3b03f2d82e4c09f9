"""Hot requests of sparse attention beside resident ones: preset `S`, each beside its plan.

Weights are made once, and each arm is measured in a steady state at each overlap of selections.
What was measured is written after each arm, so that a run that is cut off leaves figures.

    python benchmarks/hot_set.py --out benchmarks/results/hot_set.json              # an H200
    python benchmarks/hot_set.py --arms resident,hot-set --users 8,16
    python benchmarks/hot_set.py --variant shared --row-prefetch 1
    python benchmarks/hot_set.py --row-prefetch 2 --guessed 0.8  # the next layer's rows come ahead
    python benchmarks/hot_set.py --index-dtype auto              # index keys in 16 bits
    python benchmarks/hot_set.py --preset S-small --steps 20                        # a CPU
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import record

from hotset.bench.arms import check_arms, parse_arms
from hotset.bench.presets import PRESETS
from hotset.bench.runs import Bench, RunOptions, Say, describe_error
from hotset.cost.selection import GUESSED
from hotset.model.dummy import load_dummy
from hotset.options import Options

_STATE_S = 5.0


def make_say() -> Say:
    """Lines as they come, and the state now and then."""
    last_s = 0.0

    def progress(state: Any) -> None:
        nonlocal last_s
        if time.perf_counter() - last_s > _STATE_S:
            last_s = time.perf_counter()
            record.say(state())

    return Say(record.say, progress)


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--preset", default="S", choices=["S", "S-small"])
    parser.add_argument("--model", help="shape in place of the preset's: a name or a config file")
    parser.add_argument("--variant", choices=["plain", "shared"], default="plain")
    # The arm that takes longer comes first, as a run may be cut off.
    parser.add_argument("--arms", default="hot-set,resident")
    parser.add_argument("--overlaps", default="0.40", help="of neighbouring selections: 0.35,0.50")
    parser.add_argument("--guessed", type=float, default=GUESSED, help="share of a selection")
    parser.add_argument("--users", default="", help="numbers offered, one after another: 8,16")
    parser.add_argument("--steps", type=int, default=150, help="that are timed")
    parser.add_argument("--fill-s", type=float, default=60.0, help="most seconds to steady state")
    parser.add_argument("--context", type=int, help="tokens of a prompt")
    parser.add_argument("--hardware", help="profile of the plan")
    parser.add_argument("--index-dtype", choices=["auto", "fp8"])
    for name in ("hot-gib", "host-gib"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("hot-tokens", "row-prefetch", "max-num-seqs"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    preset = PRESETS[given.preset]
    assert preset.model is not None
    model = given.model or preset.model
    if given.variant == "shared":
        model = str(Path(preset.model).with_name("dsa-8l-shared.json"))
    sizes = {"hot_gib": preset.hot_gib, "host_gib": preset.host_gib, **preset.engine}
    names = ("hot_gib", "host_gib", "hot_tokens", "row_prefetch", "max_num_seqs", "index_dtype")
    asked = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    config = Options.of(model=model, **sizes | asked)
    spec = preset.spec
    if given.context is not None:
        spec = replace(spec, first_tokens=given.context)
    arms = parse_arms(given.arms)
    check_arms(arms, config)
    loaded = load_dummy(model, device=config.model.device, dtype=config.model.dtype)
    record.say(f"{loaded.name}: random weights on {loaded.model.device}")
    found = record.start(
        model=loaded.name, workload=spec.as_dict(), options=sizes | asked, seed=spec.seed, runs=[]
    )
    make_options = partial(
        RunOptions,
        max_s=given.fill_s,
        hardware=given.hardware,
        selection_guessed=given.guessed,
        steady_steps=given.steps,
        steady_users=tuple(map(int, filter(None, given.users.split(",")))),
    )
    for overlap in map(float, given.overlaps.split(",")):
        bench = Bench(spec, config, loaded, make_options(selection_overlap=overlap), make_say())
        for arm in arms:
            try:
                run = bench.run(arm, 0)
            except Exception as error:  # the other arms' figures are worth keeping
                record.say(f"{arm}, overlap {overlap}: failed: {describe_error(error)}")
                found["runs"].append({"arm": arm, "overlap": overlap, "error": str(error)})
            else:
                kept = {"start_s": run.start_s, "tiers_ready_s": run.tiers_ready_s}
                record.say(f"{arm}, overlap {overlap}: done")
                kept |= {"guessed": given.guessed} if given.row_prefetch == 2 else {}
                found["runs"].append({"arm": arm, "overlap": overlap, **kept, "steady": run.steady})
            record.write(given.out, found)
        print_ratio(found["runs"], overlap)


def print_ratio(runs: list[dict[str, Any]], overlap: float) -> None:
    """A line for each number of users that both arms were offered."""
    steady = {
        run["arm"]: run["steady"] for run in runs if run["overlap"] == overlap and "steady" in run
    }
    for hot, resident in zip(steady.get("hot-set", ()), steady.get("resident", ()), strict=False):
        rates = [one["output_tokens_per_s"] for one in (hot, resident)]
        line = (
            f"overlap {overlap}, {hot['offered']} offered: {rates[0] / rates[1]:.3f} times resident"
        )
        if hot["planned"] and resident["planned"]:
            plans = [one["planned"]["tokens_per_s"] for one in (hot, resident)]
            line += f", {plans[0] / plans[1]:.3f} planned"
        record.say(line)


if __name__ == "__main__":
    main()
