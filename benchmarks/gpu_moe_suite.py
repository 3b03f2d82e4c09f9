r"""Workload D of a comparison on one GPU, Qwen3-30B-A3B with random weights, all in one process.

`hotset bench --preset D256-32 --total-gib 40` loads the model for each workload and arm; here it
is loaded once. Shapes and seeds are those of the presets. Each line has the figures of a run and
beside them what the cost model predicted. Answers are compared with those of the first run of the
same requests.

    python benchmarks/gpu_moe_suite.py --cases resident,total --out FILE
    python benchmarks/gpu_moe_suite.py --cases total --cold-dtype fp8 --out FILE
    python benchmarks/gpu_moe_suite.py --cases evictions --router-skew 0.45 --out FILE
    python benchmarks/gpu_moe_suite.py --cases sweep --out FILE
    python benchmarks/gpu_moe_suite.py --cases total --only D256 --quantisation fp8 --out FILE

Hit rates need no GPU, and a smaller model has them too:

    python benchmarks/gpu_moe_suite.py --cases evictions --router-skew 0.45 --total-gib 0.376 \
        --device cpu --model src/hotset/bench/shapes/qwen3-moe-small.json --out FILE
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import narrow_models
import record

from hotset.bench.presets import PRESETS
from hotset.bench.result import ArmRun
from hotset.bench.runs import Bench, RunOptions, Say, describe_error
from hotset.bench.workload import Spec
from hotset.eviction import POLICIES
from hotset.model.dummy import load_dummy
from hotset.model.loaded import LoadedModel
from hotset.options import Options

MAX_MODEL_LEN = 2048
SWEPT_SLOTS = {"D256-32": (30, 60), "D16": (60,)}


@dataclass(frozen=True, slots=True)
class Case:
    """One run: `arm` as in `hotset bench`, `options` of `Options`."""

    name: str
    spec: Spec
    arm: str
    options: dict[str, Any]


def resident_cases() -> list[Case]:
    cases = [("D256-64", {}), ("D256", {}), ("D16", {}), ("D1", {}), ("D8", {})]
    return [
        Case(
            f"{name} resident",
            replace(PRESETS[name].spec, **changes),
            "resident",
            {"hot_gib": 20.0},
        )
        for name, changes in cases
    ]


def total_cases(total_gib: float, short_tokens: int) -> list[Case]:
    """A budget for everything, split by the cost model."""
    queue, few = PRESETS["D256-32"].spec, replace(PRESETS["D16"].spec, output_tokens=short_tokens)
    return [
        Case("D256-32 total", queue, "experts", _split(total_gib, queue, "throughput")),
        Case("D16 total", few, "experts", _split(total_gib, few, "latency")),
    ]


def sweep_cases(total_gib: float, short_tokens: int) -> list[Case]:
    """The same budget, split otherwise; and as the cost model splits it."""
    cases = []
    for solved in total_cases(total_gib, short_tokens):
        cases.append(solved)
        name = solved.name.removesuffix(" total")
        for num_slots in SWEPT_SLOTS[name]:
            options = {
                "total_gib": total_gib,
                "expert_slots": num_slots,
                "max_num_seqs": solved.spec.users,
            }
            cases.append(Case(f"{name}, {num_slots} slots", solved.spec, "experts", options))
    return cases


def eviction_cases(total_gib: float, short_tokens: int) -> list[Case]:
    """16 users by each policy. With lifo most slots keep what they held at first."""
    _, few = total_cases(total_gib, short_tokens)
    return [
        replace(few, name=f"D16, {policy}", options=few.options | {"expert_eviction": policy})
        for policy in POLICIES
    ]


def _split(total_gib: float, spec: Spec, target: str) -> dict[str, Any]:
    return {
        "total_gib": total_gib,
        "target": target,
        "expected_users": spec.users,
        "expected_prompt_tokens": spec.first_tokens,
        "expected_output_tokens": spec.output_tokens,
        "max_num_seqs": spec.users,
    }


def run_case(case: Case, base: Options, loaded: LoadedModel, skew: float | None) -> ArmRun:
    options = RunOptions(verify=True, wait_for_tiers=True, router_skew=skew)
    say = Say(lambda text: print(text, flush=True), lambda make: None)
    bench = Bench(case.spec, base.but(**case.options), loaded, options, say)
    run = bench.run(case.arm, 0)
    run.notes.extend(bench.notes)
    return run


def line(case: Case, run: ArmRun) -> str:
    """The figures of a run and what was predicted."""
    ttft, tpot = run.latencies["ttft_s"], run.latencies.get("tpot_s") or {"mean": 0.0}
    text = (
        f"{case.name}: {run.wall_s:.2f} s, {run.output_tokens_per_s:,.0f} output tokens/s, "
        f"{run.total_tokens_per_s:,.0f} total, TTFT {ttft['mean']:.2f} mean {ttft['p99']:.2f} p99, "
        f"TPOT {tpot['mean'] * 1e3:.1f} ms, {run.engine['steps']} steps, experts there / not "
        f"{run.engine['expert_hits']} / {run.engine['expert_misses']}, moved "
        f"{run.engine['expert_bytes'] / 1e9:.0f} GB, on the device "
        f"{run.sizes.get('experts_device_bytes', 0) / 1e9:.1f} GB, host "
        f"{run.sizes.get('experts_host_bytes', 0) / 1e9:.1f} GB, peak "
        f"{(run.peak_device_bytes or 0) / 1e9:.1f} GB"
    )
    if run.prediction is not None:
        text += f"; predicted {run.prediction['wall_s']:.2f} s"
        if (at := run.prediction.get("at_hit_rate")) is not None:
            text += f", {at['wall_s']:.2f} at hit rate {at['hit_rate']:.3f}"
    return text


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--quantisation", choices=list(narrow_models.QUANTISATIONS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mixed-tokens", type=int)
    parser.add_argument("--cases", default="resident,total")
    parser.add_argument("--total-gib", type=float, default=40.0)
    parser.add_argument("--short-tokens", type=int, default=64, help="Answers of D16 here.")
    parser.add_argument("--cold-dtype", default="auto")
    parser.add_argument("--router-skew", type=float)
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--prefetch", type=int, default=0)
    parser.add_argument("--only", default="", help="Cases whose names begin with one of these.")
    arguments = parser.parse_args()
    sizes = (arguments.total_gib, arguments.short_tokens)
    groups = {
        "resident": resident_cases,
        "total": lambda: total_cases(*sizes),
        "sweep": lambda: sweep_cases(*sizes),
        "evictions": lambda: eviction_cases(*sizes),
    }
    cases = [case for name in arguments.cases.split(",") for case in groups[name]()]
    only = tuple(arguments.only.split(","))
    cases = [case for case in cases if case.name.startswith(only)]
    start_s = time.perf_counter()
    loaded = load_dummy(
        narrow_models.config_file(arguments.model, arguments.quantisation),
        device=arguments.device,
        dtype="auto",
        router_skew=arguments.router_skew,
    )
    print(f"weights made in {time.perf_counter() - start_s:.1f} s", flush=True)
    base = Options.of(
        max_num_batched_tokens=8192,
        max_mixed_tokens=arguments.mixed_tokens,
        max_model_len=MAX_MODEL_LEN,
    )
    found = record.start(model=arguments.model, quantisation=arguments.quantisation, runs={})
    answers: dict[Spec, dict[tuple[int, int], list[int]]] = {}
    for case in cases:
        if case.arm == "experts":
            case.options.update(
                expert_cold_dtype=arguments.cold_dtype,
                expert_plan=arguments.plan,
                expert_prefetch=arguments.prefetch,
            )
        try:
            run = run_case(case, base, loaded, arguments.router_skew)
        except Exception as error:
            print(f"{case.name}: {describe_error(error)}", flush=True)
            continue
        first = answers.setdefault(case.spec, dict(run.outputs))
        same = sum(run.outputs[key] == first[key] for key in first)
        found["runs"][case.name] = run.as_dict() | {
            "workload": case.spec.as_dict(),
            "options": case.options,
            "same_answers": [same, len(first)],
        }
        record.write(arguments.out, found)
        print(f"{line(case, run)}; {same} of {len(first)} answers as before", flush=True)


if __name__ == "__main__":
    main()
