"""`hotset batch`: run an OpenAI batch file."""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hotset.cli.options import Command, engine_options, runs_on_ranks
from hotset.options import Options

if TYPE_CHECKING:
    from rich.console import Console

    from hotset.server.batch_file import Batch, BatchSummary


@click.command(cls=Command)
@click.argument("source", metavar="IN.jsonl", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("results", metavar="OUT.jsonl", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--window",
    type=click.IntRange(min=1),
    help="Most lines in flight.  [default: 4 times --max-num-seqs]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as one JSON object.")
@engine_options
@runs_on_ranks
def command(
    source: Path, results: Path, window: int | None, as_json: bool, options: Options
) -> None:
    r"""Answer the requests of IN.jsonl into OUT.jsonl, in the same order.

    Each line of IN.jsonl is a request of the OpenAI batch format, for /v1/chat/completions or
    /v1/completions; whatever `model` it names, the model of this command answers. A bad line
    becomes a line with an `error`, and the rest goes on; the exit status is 0 then too.

    Stopped by Ctrl-C or a crash, the same command goes on where it was: lines of OUT.jsonl are
    kept and not run again. Where they answer other requests than IN.jsonl has now, or are of
    another model or other options that change answers, the command says so and changes nothing.

    \b
    Example:
      echo '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body":
      {"messages": [{"role": "user", "content": "Hello"}]}}' | tr -d '\n' > in.jsonl
      hotset batch in.jsonl out.jsonl
    """
    from rich.console import Console  # not for --help, as torch below

    from hotset.model.loader import fingerprint_of
    from hotset.server.batch_file import Batch, BatchSummary
    from hotset.server.batch_identity import RunIdentity

    batch = Batch(source, results)
    console = Console(stderr=True)
    try:
        if batch.num_done:  # a model in vain takes minutes to load
            asked = options.model
            fingerprint = fingerprint_of(
                asked.model,
                device=asked.device,
                dtype=asked.dtype,
                activations=asked.activations,
            )
            batch.check_run(RunIdentity.of(fingerprint, options))
            console.print(f"{batch.num_done} of {batch.num_lines} lines are there already")
        if batch.num_done == batch.num_lines:  # then no model is needed
            summary, wall_s = BatchSummary(skipped=batch.num_done), 0.0
        else:
            summary, wall_s = _run(
                batch, window or 4 * options.schedule.max_num_seqs, options, console
            )
    finally:
        batch.close()
    if as_json:
        click.echo(json.dumps({**asdict(summary), "wall_s": round(wall_s, 3)}))
    console.print(
        f"{summary.lines} lines written, {summary.errors} of them errors; "
        f"{summary.completion_tokens} tokens in {wall_s:.1f} s",
        highlight=False,
    )


def _run(
    batch: "Batch", window: int, options: Options, console: "Console"
) -> "tuple[BatchSummary, float]":
    """Answer the lines that are left, with a progress bar; returns the time it took too."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from hotset.engine.service import EngineService
    from hotset.server.batch_identity import RunIdentity

    with contextlib.closing(EngineService(options)) as service:
        click.echo(service.report, err=True)
        progress = Progress(
            TextColumn("lines"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            console=console,
        )
        start_s = time.perf_counter()
        with progress:
            task = progress.add_task("", total=batch.num_lines, completed=batch.num_done, rate=0.0)

            def show(summary: "BatchSummary") -> None:
                seconds = time.perf_counter() - start_s
                progress.update(task, advance=1, rate=summary.completion_tokens / seconds)

            try:
                summary = batch.run(
                    service,
                    window=window,
                    identity=RunIdentity.of_model(service.model, options),
                    on_line=show,
                )
            except KeyboardInterrupt:
                console.print("stopped; the same command goes on from here")
                raise
        return summary, time.perf_counter() - start_s
