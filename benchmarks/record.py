"""How results are written: what made them, where, and how values spread. Used by every script here.

A record is plain data in one JSON file: `command`, `commit`, `machine` (hardware and versions),
`seed` where something is drawn, and the figures. A page of the same name ends with `footer`.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hotset.bench.machine import describe_machine

_START_S = time.perf_counter()


def seconds() -> float:
    """Since the script began, with one decimal."""
    return round(time.perf_counter() - _START_S, 1)


def say(text: str) -> None:
    """Print a line with the seconds since the script began."""
    print(f"[{seconds():6.1f} s] {text}", flush=True)


def arguments(doc: str, *, out: str = "file of the results") -> argparse.ArgumentParser:
    """A parser with the first line of a script's docstring, and `--out`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, help=out)
    return parser


def start(**facts: Any) -> dict[str, Any]:
    """A record of this process and these facts."""
    machine = describe_machine()
    del machine["command"]
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "commit": machine.pop("commit"), "machine": machine, **facts}


def write(out: Path | None, record: dict[str, Any] | list[Any], page: str | None = None) -> None:
    """Write `.json`, and with a page `.md` beside it; nothing where there is no `out`."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n", "utf-8")
    if page is not None:
        out.with_suffix(".md").write_text(page, "utf-8")


def add(out: Path | None, label: str, record: dict[str, Any]) -> None:
    """Write a record under its label; those of other labels in the file stay."""
    if out is not None:
        kept = json.loads(out.read_text("utf-8")) if out.exists() else {}
        write(out, kept | {label: record})


def percentiles(
    values: Sequence[float], *, of: Sequence[int] = (50, 90, 99), scale: float = 1, digits: int = 4
) -> dict[str, float]:
    """`p50`, `p90`, ... of the values times `scale`."""
    return {f"p{p}": round(scale * float(np.percentile(values, p)), digits) for p in of}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table: a column for each field that any has, floats with three digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def footer(record: dict[str, Any]) -> str:
    """The lines of a page that say what made it."""
    machine = record["machine"]
    gpus = "".join(f", {gpu['name']}" for gpu in machine["gpus"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    seed = f", seed {record['seed']}" if "seed" in record else ""
    return (
        f"- command: `{record['command']}`{seed}, commit {record['commit']}\n"
        f"- hardware: {machine['cpu']}, {machine['cpu_cores']} cores, "
        f"{machine['cpu_threads']} threads{gpus}\n"
        f"- {versions}\n"
    )
