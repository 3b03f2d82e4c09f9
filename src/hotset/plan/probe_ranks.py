"""Measure what several GPUs of this host reach together: the part `together` of a profile.

A process per GPU, as the engine has them. Everything is bounded in time, and no process is left.
"""

import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.multiprocessing.spawn import start_processes as start

from hotset.errors import ConfigError
from hotset.parallel.group import serve_store
from hotset.plan.rank_times import Effort, measure

TIMEOUT_S = 120.0  # of each number of GPUs
_MOST_PROCESSES = 16  # on a CPU, where they are for tests
_GRACE_S = 2.0


def check_gpus(device: str, gpus: int) -> None:
    """Raise ConfigError where there are fewer GPUs than asked for."""
    if device == "cpu":
        if not 1 <= gpus <= _MOST_PROCESSES:
            raise ConfigError(f"gpus is {gpus}; expected 1 to {_MOST_PROCESSES} processes on a CPU")
        return
    there = torch.cuda.device_count()
    if not 1 <= gpus <= there:
        raise ConfigError(
            f"gpus is {gpus}, and this machine has {there}; expected 1 to {max(1, there)}"
        )


def probe_ranks(device: str, gpus: int, effort: Effort | None = None) -> dict[str, Any]:
    """What 2, 4 and so on up to `gpus` GPUs reach together, by their number.

    Args:
        device: `cuda`, or `cpu` for processes that stand for GPUs.
        gpus: the most of them; 1 gives nothing.
        effort: how long each figure may take.

    Raises:
        ConfigError: there are fewer GPUs, or a process ended with an error or took too long.
    """
    check_gpus(device, gpus)
    counts = sorted({*(2**n for n in range(1, gpus.bit_length())), gpus} - {1})
    return {str(count): _probe(device, count, effort or Effort()) for count in counts}


def _probe(device: str, count: int, effort: Effort) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hotset-probe-") as folder:
        errors = f"{folder}/stderr-"
        try:
            return _measured(device, count, effort, errors)
        except (ProcessRaisedException, ProcessExitedException) as error:
            cause = str(error).strip().splitlines()[-1]
            if isinstance(error, ProcessExitedException):
                cause += _last_line(f"{errors}{error.error_index}")
            raise ConfigError(
                f"the probe of {count} GPUs failed on rank {error.error_index}: {cause}"
            ) from error
        finally:
            for path in sorted(Path(folder).iterdir()):
                sys.stderr.write(path.read_text(errors="replace"))


def _measured(device: str, count: int, effort: Effort, errors: str) -> dict[str, Any]:
    """What rank 0 sends; the files `errors` and a rank get what that rank writes to stderr."""
    deadline = time.monotonic() + TIMEOUT_S
    store = serve_store(count, TIMEOUT_S)
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    arguments = (device, count, store.port, TIMEOUT_S, effort, sender, errors)
    ranks = start(measure, arguments, nprocs=count, join=False, daemon=True)
    assert ranks is not None
    sender.close()
    try:
        while not ranks.join(max(0.0, deadline - time.monotonic()), grace_period=_GRACE_S):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"the probe of {count} GPUs took over {TIMEOUT_S:.0f} s and was ended; probe "
                    "fewer with --gpus, or see whether another process uses them"
                )
        return _answer(receiver, count)
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
        receiver.close()


def _last_line(path: str) -> str:
    """The last line that a rank wrote to stderr, behind a colon; empty where it wrote none."""
    try:
        lines = Path(path).read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def _answer(receiver: Connection, count: int) -> dict[str, Any]:
    """What rank 0 has sent before it ended."""
    if not receiver.poll():
        raise ConfigError(f"the probe of {count} GPUs ended without figures; run it again")
    found: dict[str, Any] = receiver.recv()
    return found
