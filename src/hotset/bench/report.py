"""The table on the terminal."""

from collections.abc import Callable, Sequence

from hotset.bench.result import ArmRun, BenchResult
from hotset.bench.verdict import fetched_tokens, link_busy_s

Cell = Callable[[ArmRun], str]


def number(value: float | None, digits: int = 0, unit: float = 1.0) -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def gb(value: float | None) -> str:
    """Bytes in GB, of small ones three digits."""
    if value is None:
        return "-"
    return f"{value / 1e9:,.2f}" if value >= 1e9 or not value else f"{value / 1e9:.3g}"


def latency_cell(name: str, unit: float, digits: int) -> Cell:
    """Mean and percentiles of a latency."""

    def cell(run: ArmRun) -> str:
        figures = run.latencies.get(name) or {}
        shown = [number(figures.get(key), digits, unit) for key in ("mean", "p50", "p90", "p99")]
        return " / ".join(shown)

    return cell


def _counter(name: str) -> Cell:
    return lambda run: number(run.count(name))


def _moved(direction: str) -> Cell:
    def cell(run: ArmRun) -> str:
        moved = run.engine.get("moved_bytes")
        return "-" if moved is None else gb(moved.get(direction, 0))

    return cell


def _link(run: ArmRun) -> str:
    rate = run.sizes.get("link_bytes_per_s", {}).get("host")
    return f"{link_busy_s(run):.3g} of {run.wall_s:.2f} at {rate / 1e9:.1f}" if rate else "-"


def _predicted(run: ArmRun) -> str:
    if run.prediction is None:
        return "-"
    expected = run.prediction["total_tokens_per_s"]
    return f"{expected:,.0f} ({expected / run.total_tokens_per_s - 1:+.0%})"


def _by_turn(run: ArmRun) -> str:
    shown = run.ttft_by_turn_s[:10]
    return " ".join(f"{value:.2f}" for value in shown) + (" ..." if run.ttft_by_turn_s[10:] else "")


def _disk(run: ArmRun) -> str:
    return f"{_moved('host>disk')(run)} / {_moved('disk>host')(run)}"


def rows(result: BenchResult) -> list[tuple[str, list[str]]]:
    """Label and one cell an arm: figures of the run of median wall time."""
    lines: list[tuple[str, Cell]] = [
        ("wall, s", lambda run: number(run.wall_s, 2)),
        ("total tokens/s", lambda run: number(run.total_tokens_per_s)),
        ("  predicted", _predicted),
        ("output tokens/s", lambda run: number(run.output_tokens_per_s, 1)),
        ("TTFT, s: mean / p50 / p90 / p99", latency_cell("ttft_s", 1, 2)),
        ("  mean by turn", _by_turn),
        ("TPOT, ms: mean / p50 / p90 / p99", latency_cell("tpot_s", 1e-3, 1)),
        ("ITL, ms: mean / p50 / p90 / p99", latency_cell("itl_s", 1e-3, 1)),
        ("end to end, s: mean / p50 / p90 / p99", latency_cell("e2e_s", 1, 2)),
        ("requests ended / failed", lambda run: f"{run.requests:,} / {run.failed:,}"),
        ("prompt tokens", lambda run: number(run.prompt_tokens)),
        ("output tokens", lambda run: number(run.output_tokens)),
        ("tokens computed", _counter("computed_tokens")),
        ("  again for the same request", _counter("recomputed_tokens")),
        ("tokens fetched", lambda run: number(fetched_tokens(run)) if run.engine else "-"),
        ("  found, but computed by choice", _counter("recompute_chosen_tokens")),
        ("preemptions", _counter("preemptions")),
        ("steps", _counter("steps")),
        ("mean step, ms", lambda run: number(run.engine.get("mean_step_ms"), 2)),
        ("host to device, GB", _moved("host>device")),
        ("device to host, GB", _moved("device>host")),
        ("to / from disk, GB", _disk),
        ("link to device: s of wall, GB/s", _link),
        ("hot / host / disk tier, k tokens", _tiers),
        ("experts on device / host, GB", _expert_places),
        ("needed experts: there / not", _expert_uses),
        ("  hit rate", _hit_rate),
        ("experts predicted / rightly / copied ahead", _prefetch),
        ("rounding of experts, relative RMS", _rounding),
        ("experts to device, GB", lambda run: gb(run.count("expert_bytes") or None)),
        ("peak host RSS, GB", lambda run: gb(run.peak_host_rss_bytes)),
        ("peak device memory, GB", lambda run: gb(run.peak_device_bytes)),
        ("engine start + tiers ready, s", _start),
    ]
    runs = [result.typical(arm) for arm in result.arms]
    shown = [(label, [cell(run) for run in runs]) for label, cell in lines]
    kept = [(label, cells) for label, cells in shown if any(c.strip("-/ ") for c in cells)]
    if any(len(result.times_s(arm)) > 1 for arm in result.arms):
        spread = [" ".join(f"{wall:.2f}" for wall in result.times_s(arm)) for arm in result.arms]
        kept.insert(1, ("  of each run", spread))
    ratios = [result.ratio(arm) for arm in result.arms]
    if len(result.arms) > 1 and any(ratios):
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        by_request = " (mean of requests)" if result.is_open_loop else ""
        kept.insert(1, (f"  times as fast as {result.baseline}{by_request}", cells))
    return kept


def _tiers(run: ArmRun) -> str:
    names = ("hot_tokens", "host_tokens", "disk_tokens")
    return " / ".join(number(run.sizes.get(name), 1, 1e3) for name in names)


def _expert_places(run: ArmRun) -> str:
    device, host = (run.sizes.get(f"experts_{where}_bytes") for where in ("device", "host"))
    return f"{gb(device)} / {gb(host)}"


def _expert_uses(run: ArmRun) -> str:
    """Only the plan that looks for experts counts; one that moves them all does not."""
    if run.engine.get("expert_hit_rate") is None:
        return "-"
    return f"{number(run.count('expert_hits'))} / {number(run.count('expert_misses'))}"


def _hit_rate(run: ArmRun) -> str:
    rate = run.engine.get("expert_hit_rate")
    return "-" if rate is None else f"{rate:.1%}"


def _prefetch(run: ArmRun) -> str:
    names = ("expert_predicted", "expert_predicted_right", "expert_copied_ahead")
    if not run.count(names[0]):
        return "-"
    return " / ".join(number(run.count(name)) for name in names)


def _rounding(run: ArmRun) -> str:
    error = run.engine.get("expert_rounding_error")
    return f"{error:.2%}" if error else "-"


def _start(run: ArmRun) -> str:
    if run.start_s is None:
        return "-"
    return f"{run.start_s:.1f} + {run.tiers_ready_s or 0.0:.1f}"


def table(result: BenchResult) -> str:
    """The table as text; empty where no run has ended."""
    return aligned([("", result.arms), *rows(result)]) if result.runs else ""


def aligned(lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Labels to the left, and the cells of each column to the right."""
    label_width = max(len(label) for label, _ in lines)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    return "\n".join(
        f"{label:<{label_width}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in lines
    )


def text(result: BenchResult) -> str:
    """Everything that is printed at the end."""
    machine = result.machine
    where = [gpu["name"] for gpu in machine["gpus"]] or [machine["cpu"]]
    repeats = max((len(result.times_s(arm)) for arm in result.arms), default=0)
    head = [
        result.title,
        f"seed {result.asked['workload'].get('seed')}; {' + '.join(where)}; "
        f"commit {machine['commit'] or 'unknown'}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]
    if repeats > 1:
        head.append(f"each arm ran {repeats} times; the run of median time is shown")
    notes = dict.fromkeys(note for run in result.runs for note in run.notes)
    parts = [f"note: {note}" for note in notes]
    parts += [f"note: {note}" for note in result.asked.get("notes", [])]
    for arm in result.arms:
        failed = [run for run in result.runs if run.arm == arm and run.first_error]
        parts += [f"{arm}: {run.failed} requests failed: {run.first_error}" for run in failed]
    parts += [f"{f.arm}, round {f.repeat + 1}: FAILED: {f.reason}" for f in result.failures]
    if result.verification is not None:
        parts.append(verification_line(result))
    parts.append(result.verdict)
    return "\n".join([*head, "", table(result), "", *parts])


def verification_line(result: BenchResult) -> str:
    """How many answers differ from those of the first run."""
    found = result.verification
    assert found is not None
    if not found["runs"]:
        return "verified: nothing to compare with; give two arms or --repeats 2"
    lines = []
    for run in found["runs"]:
        after = f", {run['not_compared']} after a difference" if run["not_compared"] else ""
        lines.append(
            f"{run['arm']} differs in {run['differing']} of {run['compared']} answers{after}"
        )
    return f"verified against {found['reference']}: " + "; ".join(lines)
