r"""What 1, 2, 4 and 8 GPUs of one host give: each row is predicted, then run, in one call.

The links and collectives are measured first (`hotset probe --gpus`). With them and constants of
one GPU the cost model says what a row takes, before it runs. Each model is loaded by a process of
its own for each number of GPUs, so that one that fails or hangs ends alone. The file has all rows
so far after each one, and rows of an earlier call stay until they are run again.

    python benchmarks/many_gpus.py --out benchmarks/results/many_gpus_h200.json
    python benchmarks/many_gpus.py --gpus 1,2 --jobs dense,experts-bf16 --out FILE
    python benchmarks/many_gpus.py --device cpu --gpus 1,2 --out FILE    # a try, tiny models

`hotset plan --example moe-7.8x` shows what was measured if the file lies at
`src/hotset/plan/many_gpus.json`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from many_gpus_rows import MAX_STEP_TOKENS, Job, Row, Size, jobs, predict_row

from hotset.bench.campaign import load_part
from hotset.bench.runs import Bench, RunOptions, Say, describe_error
from hotset.cost.hardware import Hardware, load_hardware
from hotset.cost.together import together_from_json
from hotset.engine.load import load_on_ranks
from hotset.errors import HotsetError, PlanError
from hotset.options import Options
from hotset.plan.probe_ranks import probe_ranks
from hotset.plan.rank_times import Effort

_TRY = Effort(sizes=(4096, 2**20), copy_bytes=2**20, figure_s=0.02)

Found = dict[str, Any]


def run_job(job: Job, size: Size, hardware: Hardware, device: str, out: Path) -> None:
    """Predict and run the rows of a job; `out` has those that are done."""
    found: list[Found] = []
    by_tp: dict[int, list[Row]] = {}
    for row in job.rows:
        by_tp.setdefault(row.tp, []).append(row)
    for tp, rows in by_tp.items():
        predicted = [predicted_row(job, row, hardware) for row in rows]
        found += predicted
        out.write_text(json.dumps(found), "utf-8")
        to_run = [pair for pair in zip(rows, predicted, strict=True) if not is_left_out(pair[1])]
        if not to_run:
            continue
        config = Options.of(
            model=job.file(),
            device=device,
            tp=tp,
            max_num_batched_tokens=MAX_STEP_TOKENS,
            max_num_seqs=max(row.spec.users for row in rows),
            max_model_len=size.max_model_len,
            **job.options,
        )
        on_host = bool(job.options)
        loaded = load_on_ranks(config, load_part, config, True, None, on_host)
        try:
            for row, entry in to_run:
                entry |= measured_row(row, config, loaded)
                print(line(entry), flush=True)
                out.write_text(json.dumps(found), "utf-8")
        finally:
            if loaded.ranks is not None:
                loaded.ranks.close()


def predicted_row(job: Job, row: Row, hardware: Hardware) -> Found:
    entry: Found = {"row": f"{job.name}: {row.name}", "gpus": row.gpus, "layout": str(row.layout)}
    if row.layout is None:
        entry["layout"] = f"tp={row.gpus}"
    if row.expert_row is not None:
        entry["row"] = row.name  # as the example has it
    try:
        entry["predicted_s"] = predict_row(job, row, hardware)
    except PlanError as error:
        entry["predicted_s"], entry["why_not_run"] = None, str(error)
    if row.why_not:
        entry["why_not_run"] = row.why_not
    print(f"before it runs: {line(entry)}", flush=True)
    return entry


def measured_row(row: Row, config: Options, loaded: Any) -> Found:
    say = Say(lambda text: print(text, flush=True), lambda make: None)
    try:
        bench = Bench(row.spec, config.but(**row.options), loaded, RunOptions(), say)
        run = bench.run(row.arm, 0)
    except HotsetError as error:
        return {"measured_s": None, "error": describe_error(error)}
    seconds = run.latencies["itl_s"]["p50"] if row.is_step else run.wall_s
    return {
        "measured_s": seconds,
        "is_step": row.is_step,
        "is_complete": run.is_complete,
        "output_tokens_per_s": run.output_tokens_per_s,
        "expert_hit_rate": run.engine.get("expert_hit_rate"),
        "fetched_bytes": run.engine.get("fetched_bytes"),
    }


def is_left_out(entry: Found) -> bool:
    """What cannot be predicted is not run either."""
    return "why_not_run" in entry


def line(entry: Found) -> str:
    """A row in one line, the error with its sign: positive where the prediction is too fast."""
    text = f"{entry['gpus']} GPUs ({entry['layout']}), {entry['row']}: predicted "
    predicted, measured = entry["predicted_s"], entry.get("measured_s")
    text += "nothing" if predicted is None else f"{predicted * 1e3:,.2f} ms"
    if measured is not None:
        text += f", measured {measured * 1e3:,.2f} ms"
    if measured and predicted:
        text += f", error {measured / predicted - 1:+.1%}"
    for name in ("error", "why_not_run"):
        text += f"; {entry[name]}" if name in entry else ""
    return text


def run_apart(name: str, gpus: int, arguments: Any, together: Path) -> list[Found]:
    """The rows of a job that another process runs; those that it had when it ended."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        words = ["--job", name, "--gpus", str(gpus), "--device", arguments.device]
        words += ["--hardware", arguments.hardware, "--together", str(together)]
        process = subprocess.Popen(
            [sys.executable, __file__, *words, "--out", str(part)], start_new_session=True
        )
        reason = ""
        try:
            if status := process.wait(arguments.job_timeout_s):
                reason = f"its process ended with {status}"
        except subprocess.TimeoutExpired:
            reason = f"its process took over {arguments.job_timeout_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # itself and its ranks
                process.wait()
        found: list[Found] = json.loads(part.read_text("utf-8")) if part.exists() else []
    for entry in found:
        if reason and not {"measured_s", "why_not_run"} & set(entry):
            entry |= {"measured_s": None, "error": reason}
    if reason:
        print(f"{name} on {gpus} GPUs: {reason}", flush=True)
    return found


def summary(rows: list[Found]) -> Found:
    """Errors of the rows that were predicted and measured, and each row against one GPU."""
    errors = [r["measured_s"] / r["predicted_s"] - 1 for r in rows if _has_both(r)]
    times = {(row["row"], row["gpus"]): row for row in rows if row.get("measured_s")}
    ratios: dict[str, dict[str, float]] = {}
    for (name, gpus), row in times.items():
        if gpus > 1 and (one := times.get((name, 1))):
            ratios.setdefault(name, {})[str(gpus)] = one["measured_s"] / row["measured_s"]
    if not errors:
        return {"rows": 0, "times_one_gpu": ratios}
    return {
        "rows": len(errors),
        "mean_absolute_error": sum(map(abs, errors)) / len(errors),
        "mean_signed_error": sum(errors) / len(errors),
        "largest_error": max(errors, key=abs),
        "times_one_gpu": ratios,
    }


def _has_both(row: Found) -> bool:
    return bool(row.get("measured_s") and row.get("predicted_s"))


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--gpus", default="1,2,4,8", help="Numbers of GPUs; others are left out.")
    parser.add_argument("--jobs", default="", help="Only these, by name; all otherwise.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--hardware", default="h200", help="Profile with constants of one GPU.")
    parser.add_argument("--job-timeout-s", type=float, default=540.0)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--together", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.gpus.split(",")]
    size = Size.small() if arguments.device == "cpu" else Size.full()
    if arguments.job:
        measured = json.loads(arguments.together.read_text("utf-8"))
        hardware = load_hardware(arguments.hardware)
        hardware = replace(hardware, together=together_from_json(measured, "probe"))
        [job] = [job for job in jobs(size, counts[0]) if job.name == arguments.job]
        run_job(job, size, hardware, arguments.device, arguments.out)
        return
    there = torch.cuda.device_count() if arguments.device == "cuda" else 16
    if missing := [count for count in counts if count > there]:
        print(f"left out, as this machine has {there} GPUs: {missing}", flush=True)
    run_all(arguments, size, [count for count in counts if count <= there])


def run_all(arguments: Any, size: Size, counts: list[int]) -> None:
    if not counts:
        sys.exit("no number of GPUs is left")
    effort = _TRY if arguments.device == "cpu" else Effort()
    together = probe_ranks(arguments.device, max(counts), effort)
    out: Path | None = arguments.out
    kept: list[Found] = []
    if out is not None and out.exists():
        kept = json.loads(out.read_text("utf-8"))["rows"]
    found = record.start(hardware=arguments.hardware, together=together, rows=kept)
    only = set(filter(None, arguments.jobs.split(",")))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(together, file)
        file.flush()
        for gpus in counts:
            for job in jobs(size, gpus):
                if only and job.name not in only:
                    continue
                new = run_apart(job.name, gpus, arguments, Path(file.name))
                names = {(row["row"], row["gpus"]) for row in new}
                others = [r for r in found["rows"] if (r["row"], r["gpus"]) not in names]
                found["rows"] = others + new
                found["summary"] = summary(found["rows"])
                record.write(out, found)
    for entry in found["rows"]:
        print(line(entry))
    print(json.dumps(found.get("summary", {})))


if __name__ == "__main__":
    main()
