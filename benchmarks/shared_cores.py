"""Products of a decode step in one and more threads, while other processes want the cores.

The linear layers of a small model (30 layers of 576 x 1536, float32, 8 rows), again and again, in
a process for each case: with the waiting that OpenMP has by default, in which threads spin, and
with hotset's, in which they sleep; beside no, one and two neighbours that only compute.

    python benchmarks/shared_cores.py --out benchmarks/results/shared_cores

writes `.json` and `.md`. Other work on the machine counts as neighbours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import record

SHAPES = ((576, 960), (576, 576), (576, 1536), (576, 1536), (1536, 576))
LAYERS, ROWS = 30, 8
WAITING = {"spins (default)": "", "sleeps (hotset)": "PASSIVE"}
_BUSY = "while True: pass"


def measure(threads: int, seconds: float) -> list[float]:
    """In a process of its own: milliseconds of each step."""
    import torch

    from hotset.linear.packed import PackedLinear

    torch.set_num_threads(threads)
    linears = [
        PackedLinear(torch.nn.Linear(a, b, bias=False).requires_grad_(False))
        for _ in range(LAYERS)
        for a, b in SHAPES
    ]
    inputs = [torch.zeros(1, ROWS, a) for _ in range(LAYERS) for a, _ in SHAPES]
    times: list[float] = []
    with torch.inference_mode():
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s or len(times) < 3:
            start_s = time.perf_counter()
            for linear, x in zip(linears, inputs, strict=True):
                torch.nn.functional.silu(linear(x))
            times.append((time.perf_counter() - start_s) * 1e3)
    return times[1:]


def run_case(threads: int, policy: str, neighbours: int, seconds: float) -> list[float]:
    """Measure one case, with its neighbours beside it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(neighbours)]
    try:
        command = [sys.executable, __file__, "--measure", str(threads), "--seconds", str(seconds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    times: list[float] = json.loads(done.stdout)
    return times


def main() -> None:
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.seconds)))
        return
    from hotset.cgroups import usable_cpus

    most = usable_cpus()
    cases = [
        (neighbours, threads, waiting)
        for neighbours in range(3)
        for threads in sorted({1, most})
        for waiting in WAITING
    ]
    times: dict[tuple[int, int, str], list[float]] = {case: [] for case in cases}
    for _ in range(args.repeats):  # one after the other, so that all see the machine alike
        for case in cases:
            neighbours, threads, waiting = case
            found = run_case(threads, WAITING[waiting], neighbours, args.seconds)
            times[case].append(statistics.median(found))
            print(*case, f"{times[case][-1]:.1f} ms", file=sys.stderr, flush=True)
    found = [
        {"neighbours": n, "threads": t, "waiting": w, "step_ms": times[n, t, w]}
        for n, t, w in cases
    ]
    result = record.start(cases=found)
    print(page := make_page(result))
    record.write(args.out, result, page)


def make_page(result: dict[str, Any]) -> str:
    cases = result["cases"]
    columns = sorted({(case["threads"], case["waiting"]) for case in cases})
    rows = []
    for neighbours in sorted({case["neighbours"] for case in cases}):
        cells = []
        for threads, waiting in columns:
            [times] = [
                case["step_ms"]
                for case in cases
                if (case["neighbours"], case["threads"], case["waiting"])
                == (neighbours, threads, waiting)
            ]
            median = statistics.median(times)
            cells.append(f"{median:,.1f} ({min(times):,.1f} to {max(times):,.1f})")
        rows.append(f"| {neighbours} | " + " | ".join(cells) + " |")
    head = " | ".join(f"{threads} threads, {waiting}" for threads, waiting in columns)
    table = "\n".join(rows)
    return f"""# Products of a decode step where cores are shared

Milliseconds of a step: the median of {len(cases[0]["step_ms"])} runs' medians, and the least and
the most of them. The machine had other work beside the neighbours.

| neighbours | {head} |
|---|{"---|" * len(columns)}
{table}

{record.footer(result)}"""


if __name__ == "__main__":
    main()
