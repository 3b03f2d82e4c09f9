"""`hotset probe`: measure this machine and keep the profile for `hotset plan --hardware this`."""

import json
from pathlib import Path
from typing import Any

import click

from hotset.cli.options import Command, check_writable
from hotset.cost.hardware import probe_path
from hotset.errors import ConfigError
from hotset.plan.text import rows


@click.command(
    cls=Command,
    epilog="Example: hotset probe && hotset plan smollm2-135m --hardware this --users 8",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What to measure; auto takes a GPU if there is one.",
)
@click.option(
    "--disk-path",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to measure the disk in.  [default: the platform's cache folder]",
)
@click.option(
    "--gpus",
    type=int,
    default=1,
    show_default=True,
    help="Measure 2, 4 and so on up to this number of GPUs together: host links and collectives.",
)
@click.option("--no-disk", is_flag=True, help="Leave the disk out.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the profile.  [default: where --hardware this looks]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the profile, nothing else.")
def command(
    device: str,
    disk_path: Path | None,
    gpus: int,
    no_disk: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure memory, link, disk and compute of this machine.

    Takes under a minute, and at most two more for each number of GPUs together.
    """
    import platformdirs

    from hotset.plan.probe import probe

    if no_disk and disk_path:
        raise ConfigError("--no-disk and --disk-path do not go together; use one of them")
    path = output or probe_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be written: {error.strerror}") from error
    check_writable(path)  # before the minute that it takes
    folder = disk_path or Path(platformdirs.user_cache_dir("hotset", appauthor=False))
    click.echo("measuring ...", err=True)
    profile = probe(device, None if no_disk else folder, gpus=gpus)
    try:
        path.write_text(json.dumps(profile, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be written: {error.strerror}") from error
    if as_json:
        click.echo(json.dumps(profile))
    else:
        click.echo(_table(profile))
    click.echo(f"wrote {path} in {profile['probe_s']} s", err=True)


def _table(profile: dict[str, Any]) -> str:
    lines = [profile["description"], ""]
    figures = dict(profile["figures"])
    for dtype, entry in figures.pop("tflops").items():
        figures[f"tflops {dtype}"] = entry
    width = max(map(len, figures))
    for name, entry in figures.items():
        value = entry["value"]
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        lines.append(
            f"{name:<{width}}  {shown:>11}  {entry['source'].removeprefix('hotset probe: ')}"
        )
    for way, rates in profile["copies_gb_per_s"].items():
        lines += ["", f"copies, {way}, GB/s by size"]
        for size, rate in rates.items():
            lines.append(f"  {_size(size):>8}  {rate:8.2f}")
    for gpus, found in profile.get("together", {}).items():
        lines += ["", *_together(gpus, found)]
    return "\n".join(lines)


def _size(num_bytes: str) -> str:
    kib = int(num_bytes) / 1024
    return f"{kib / 1024:g} MiB" if kib >= 1024 else f"{kib:g} KiB"


def _together(gpus: str, found: dict[str, Any]) -> list[str]:
    """What a number of GPUs reach at once: whether links add up, and collectives by size."""
    table = [("", "alone", "at once", "of alone")]
    links = {f"host link, {way}": rates for way, rates in found["links_gb_per_s"].items()}
    if found["peer_copies_gb_per_s"]:
        links["to the next GPU"] = found["peer_copies_gb_per_s"]
    for name, rates in links.items():
        alone, together = sum(rates["alone"]), sum(rates["together"])
        table.append((name, f"{alone:.1f}", f"{together:.1f}", f"{together / alone:.0%}"))
    names = {
        "all_reduce_us": "all-reduce",
        "nccl_all_reduce_us": "by NCCL",
        "all_gather_us": "all-gather",
        "reduce_scatter_us": "reduce-scatter",
    }
    shown = {label: found[name] for name, label in names.items() if name in found}
    times = [("", *shown)]
    for size in found["all_reduce_us"]:
        times.append((_size(size), *(f"{each[size]:,.1f}" for each in shown.values())))
    return [
        f"{gpus} at once: host links, GB/s of all ({found['source']})",
        rows(table, "  "),
        "",
        f"{gpus} at once: collectives, us by size (gathers: bytes of each)",
        rows(times, "  "),
    ]
